//! A store that does not fit is refused, with every difference named.

use specforge_store::{DType, Encoding, Error, Field, Reader, Schema, Spec, Writer, WriterOptions};

use crate::support::{eagle3, identity, write};

fn other() -> Spec {
    let mut spec = eagle3(Encoding::Fp8);
    spec.identity.target.weights_hash = "dead".into();
    spec.identity.target.path = "/elsewhere/tiny".into();
    spec.identity.capture.layers = vec![1, 2, 4];
    spec.identity.capture.last_hidden = false;
    spec.identity.max_length = 4096;
    let mut fields = spec.schema.fields().to_vec();
    fields[2].width = 48;
    fields[3] = Field::new("logits", DType::F32, 2);
    spec.schema = Schema::new(fields).unwrap();
    spec
}

#[test]
fn a_writer_names_every_difference() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &eagle3(Encoding::Bf16), &WriterOptions::default(), &[2]);
    let error = Writer::open(folder.path(), &other(), &WriterOptions::default()).unwrap_err();
    let expected = format!(
        "store {} does not fit
  encoding: store has bf16, asked for fp8
  schema: store has input_ids, loss_mask, hidden_states, last_hidden, teacher_argmax, teacher_logsumexp, \
         asked for input_ids, loss_mask, hidden_states, logits, teacher_argmax, teacher_logsumexp
  schema.hidden_states: store has bf16 x 24, asked for bf16 x 48
  schema.logits: store has nothing, asked for f32 x 2
  target.weights_hash: store has \"beef\", asked for \"dead\"
  capture.layers: store has [1,3,4], asked for [1,2,4]
  capture.last_hidden: store has true, asked for false
  max_length: store has 2048, asked for 4096
  capture into another folder, or change the recipe",
        folder.path().display()
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_reader_names_what_the_recipe_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let spec = eagle3(Encoding::Bf16);
    write(folder.path(), &spec, &WriterOptions::default(), &[2]);
    let reader = Reader::open(folder.path()).unwrap();
    let Err(Error::Mismatch { differences, .. }) = reader.expect(&other().identity, &other().schema) else {
        panic!("a mismatch was expected");
    };
    let keys: Vec<_> = differences.iter().map(|d| d.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "schema.hidden_states",
            "schema.logits",
            "target.weights_hash",
            "capture.layers",
            "capture.last_hidden",
            "max_length"
        ]
    );
}

#[test]
fn the_path_of_the_target_and_further_fields_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = eagle3(Encoding::Bf16);
    write(folder.path(), &spec, &WriterOptions::default(), &[2]);
    spec.identity.target.path = "moved/to/here".into();
    let fewer = Schema::new(spec.schema.fields()[..2].to_vec()).unwrap();
    let reader = Reader::open(folder.path()).unwrap();
    reader.expect(&spec.identity, &fewer).unwrap();
    assert_eq!(reader.spec().identity, identity());
    assert!(Writer::open(folder.path(), &spec, &WriterOptions::default()).unwrap().contains(0));
}

#[test]
fn a_shard_of_another_store_is_refused() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut spec = eagle3(Encoding::Bf16);
    write(a.path(), &spec, &WriterOptions::default(), &[2]);
    spec.identity.tokenizer_hash = "another".into();
    write(b.path(), &spec, &WriterOptions::default(), &[2]);
    fs_err::copy(a.path().join("shard-00000-00000.bin"), b.path().join("shard-00000-00000.bin")).unwrap();
    let message = Reader::open(b.path()).unwrap_err().to_string();
    assert!(message.contains("expected shard 0 of writer 0 of store"), "{message}");
}
