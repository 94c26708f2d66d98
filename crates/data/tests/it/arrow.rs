//! Datasets that the datasets library saved to disk: Arrow streams in a folder, with descriptions beside them.

use std::sync::Arc;

use arrow_array::builder::{GenericListBuilder, ListBuilder, StringBuilder, StructBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{
    Array, ArrayRef, BinaryArray, DictionaryArray, Float64Array, Int64Array, LargeStringArray, RecordBatch,
    StringArray,
};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{DataType, Field};
use specforge_data::{Error, OnError, PrepareConfig, Prepared, Source, prepare};

use crate::fixture::{Fixture, row};

type Row<'a> = Vec<(&'a str, &'a str)>;

fn quiet(config: &PrepareConfig) -> Result<Prepared, Error> {
    prepare(config, &|_, _| {})
}

/// Rows with messages, and columns of other kinds.
fn batch(rows: &[Row<'_>]) -> RecordBatch {
    let fields = ["role", "content", "name"].map(|name| Field::new(name, DataType::Utf8, true));
    let mut messages: GenericListBuilder<i32, StructBuilder> =
        ListBuilder::new(StructBuilder::from_fields(fields.to_vec(), 0));
    for row in rows {
        for (role, content) in row {
            for (index, text) in [Some(*role), Some(*content), None].into_iter().enumerate() {
                messages.values().field_builder::<StringBuilder>(index).unwrap().append_option(text);
            }
            messages.values().append(true);
        }
        messages.append(true);
    }
    let count = rows.len();
    let source: DictionaryArray<Int32Type> = vec!["web"; count].into_iter().collect();
    let columns: [(&str, ArrayRef); 6] = [
        ("messages", Arc::new(messages.finish())),
        ("image", Arc::new(BinaryArray::from_vec(vec![&[0xff, 0xd8]; count]))),
        ("score", Arc::new(Float64Array::from(vec![0.5; count]))),
        ("number", Arc::new(Int64Array::from(vec![None; count]))),
        ("source", Arc::new(source)),
        ("long", Arc::new(LargeStringArray::from(vec!["x"; count]))),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

fn stream(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

fn file(batches: &[RecordBatch]) -> Vec<u8> {
    let mut writer = FileWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
    // A file has one dictionary for all batches, and that of an empty one differs.
    let batches = batches.iter().filter(|batch| batch.num_rows() > 0);
    batches.for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    writer.into_inner().unwrap()
}

fn batches() -> Vec<RecordBatch> {
    let first = [
        vec![("user", "hello"), ("assistant", "well")],
        vec![("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ];
    vec![batch(&first), batch(&[]), batch(&[vec![("user", "é\u{0}"), ("assistant", "x \"y\"")]])]
}

#[test]
fn streams_and_files_give_the_rows_of_jsonl() {
    let fixture = Fixture::new();
    let message = |(role, content): (&str, &str)| serde_json::json!({ "role": role, "content": content });
    let line = |row: Row<'_>| {
        format!("{}\n", serde_json::json!({ "messages": row.into_iter().map(message).collect::<Vec<_>>() }))
    };
    let text = row("hello", "well")
        + &line(vec![("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
        + &line(vec![("user", "é\u{0}"), ("assistant", "x \"y\"")]);
    let expected = quiet(&fixture.config("plain.jsonl", text)).unwrap();
    for content in [stream(&batches()), file(&batches())] {
        let set = quiet(&fixture.config("in.arrow", content)).unwrap();
        assert_eq!((set.len(), set.hash()), (3, expected.hash()));
    }
}

/// Other columns are variables of the template, in their own types.
#[test]
fn columns_keep_their_types() {
    let template = "{{ source }} {{ score + 1 }} {{ number is defined }} {{ image is defined }} {{ long }} \
                    {%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
                    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let fixture = Fixture::with_template(template);
    let set = quiet(&fixture.config("in.arrow", stream(&batches()))).unwrap();
    let text = fixture.tokenizer().decode(set.row(0).ids).unwrap();
    assert!(text.starts_with("web 1.5 False False x<|im_start|>user\nhello"), "{text}");
}

#[test]
fn a_folder_of_save_to_disk_is_a_source() {
    let fixture = Fixture::new();
    let one = |text: &str| stream(&[batch(&[vec![("user", text), ("assistant", "well")]])]);
    for folder in ["saved", "saved/train", "saved/test"] {
        fs_err::create_dir(fixture.folder.path().join(folder)).unwrap();
    }
    fixture.write("saved/dataset_dict.json", "{\"splits\": [\"train\", \"test\"]}");
    fixture.write("saved/train/data-00000-of-00002.arrow", one("a"));
    fixture.write("saved/train/data-00001-of-00002.arrow", one("b"));
    fixture.write("saved/train/cache-0123.arrow", "not this");
    fixture.write("saved/test/data-00000-of-00001.arrow", one("c"));
    for folder in ["train", "test"] {
        fixture.write(&format!("saved/{folder}/state.json"), "{}");
        fixture.write(&format!("saved/{folder}/dataset_info.json"), "{}");
    }
    let mut config = fixture.config("x.jsonl", "");
    config.inputs = vec![Source::from(fixture.folder.path().join("saved"))];
    assert_eq!(quiet(&config).unwrap().len(), 2);
    config.inputs = vec![Source::from(fixture.folder.path().join("saved/test"))];
    assert_eq!(quiet(&config).unwrap().len(), 1);
}

/// What speculators' data preparation saves, by its own code; see tools/golden/others.py.
#[test]
fn a_dataset_that_speculators_tokenised_is_a_source() {
    let fixture = Fixture::new();
    let mut config = fixture.config("x.jsonl", "");
    config.inputs = vec![Source::from(specforge_testkit::own_case("others/speculators-0.9.0/dataset"))];
    let set = quiet(&config).unwrap();
    assert_eq!((set.row(0).ids, set.row(0).loss_mask), (&[7, 8, 9, 10, 11][..], &[1, 0, 1, 0, 1][..]));
}

#[test]
fn a_bad_row_is_named_by_its_number() {
    let fixture = Fixture::new();
    let rows = [
        vec![("user", "a"), ("assistant", "b")],
        vec![("wizard", "a")],
        vec![("user", "c"), ("assistant", "d")],
    ];
    let content = stream(&[batch(&rows)]);
    let error = quiet(&fixture.config("in.arrow", &content)).unwrap_err().to_string();
    assert!(error.contains("in.arrow:2: malformed row: message 1: unknown role `wizard`"), "{error}");
    assert_eq!(quiet(&fixture.skipping("in.arrow", content)).unwrap().len(), 2);
    let other = RecordBatch::try_from_iter([("x", Arc::new(StringArray::from(vec!["y"])) as Arc<dyn Array>)]);
    let error = quiet(&fixture.config("in.arrow", stream(&[other.unwrap()]))).unwrap_err().to_string();
    assert!(error.contains("line 1 has `x`; expected rows with"), "{error}");
}

/// Damage ends in a set or an error, wherever it is.
#[test]
fn no_damage_is_a_panic() {
    let fixture = Fixture::new();
    for whole in [stream(&batches()), file(&batches())] {
        for at in (0..whole.len()).step_by(53) {
            let mut damaged = whole.clone();
            damaged[at] ^= [0x01, 0x80, 0xff][at % 3];
            for content in [&damaged[..], &whole[..at]] {
                let config = PrepareConfig { on_error: OnError::Skip, ..fixture.config("in.arrow", content) };
                if let Err(error) = quiet(&config) {
                    let named = error.to_string().contains("in.arrow");
                    assert!(named || matches!(error, Error::NothingKept { .. }), "{at}: {error}");
                }
            }
        }
    }
}
