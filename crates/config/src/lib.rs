//! What the user wrote, and what it resolves to.
