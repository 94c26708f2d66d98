//! The date that templates print: a setting, not the clock, so that the same data gives the same tokens tomorrow.

use std::fmt;
use std::str::FromStr;

/// A calendar day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Date {
    year: u32,
    month: u32,
    day: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// The given day at midnight in the notation of C's `strftime`; an unknown directive stays as it is.
    pub(crate) fn strftime(self, format: &str) -> String {
        let mut text = String::new();
        let mut characters = format.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            match characters.next() {
                Some('-') => {
                    let number = characters.next().map(|directive| self.directive(directive));
                    let number = number.unwrap_or_default();
                    let short = number.trim_start_matches('0');
                    text.push_str(if short.is_empty() { "0" } else { short });
                }
                Some(directive) => text.push_str(&self.directive(directive)),
                None => text.push('%'),
            }
        }
        text
    }

    fn directive(self, directive: char) -> String {
        let Self { year, month, day } = self;
        let month_name = MONTHS[month as usize - 1];
        let day_name = DAYS[self.weekday()];
        match directive {
            'Y' => format!("{year:04}"),
            'y' => format!("{:02}", year % 100),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'e' => format!("{day:2}"),
            'B' => month_name.to_owned(),
            'b' | 'h' => month_name[..3].to_owned(),
            'A' => day_name.to_owned(),
            'a' => day_name[..3].to_owned(),
            'F' => format!("{year:04}-{month:02}-{day:02}"),
            'H' | 'M' | 'S' => "00".to_owned(),
            '%' => "%".to_owned(),
            other => format!("%{other}"),
        }
    }

    /// 0 is Sunday (Sakamoto's method).
    fn weekday(self) -> usize {
        const OFFSETS: [u32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = if self.month < 3 { self.year - 1 } else { self.year };
        let days = year + year / 4 - year / 100 + year / 400 + OFFSETS[self.month as usize - 1] + self.day;
        (days % 7) as usize
    }
}

impl Default for Date {
    /// The date that Llama 3's templates print where the engine knows no clock.
    fn default() -> Self {
        Self { year: 2024, month: 7, day: 26 }
    }
}

impl FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("`{text}` is no date; expected YYYY-MM-DD");
        let parts: Vec<u32> =
            text.split('-').map(str::parse).collect::<Result<_, _>>().map_err(|_| error())?;
        match parts[..] {
            [year @ 1..=9999, month @ 1..=12, day @ 1..=31] => Ok(Self { year, month, day }),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.directive('F'))
    }
}
