//! Stores with made-up contents, and comparing them.

use std::{collections::BTreeMap, path::Path};

use fs_err as fs;
use half::bf16;
use specforge_store::{
    CaptureSpec, DType, Encoding, Field, Identity, Record, Result, Schema, Spec, TargetIdentity, Values,
    Writer, WriterOptions,
};

/// Hidden size of the made-up target.
pub(crate) const HT: u32 = 8;

/// The fields of EAGLE3.
pub(crate) fn eagle3(encoding: Encoding) -> Spec {
    let schema = Schema::new(vec![
        Field::new("input_ids", DType::U32, 1),
        Field::new("loss_mask", DType::U8, 1),
        Field::new("hidden_states", DType::Bf16, 3 * HT),
        Field::new("last_hidden", DType::Bf16, HT),
        Field::new("teacher_argmax", DType::U32, 1),
        Field::new("teacher_logsumexp", DType::F32, 1),
    ]);
    Spec { schema: schema.unwrap(), encoding, identity: identity() }
}

/// Two small fields, for tests that touch every byte.
pub(crate) fn tiny(encoding: Encoding) -> Spec {
    let schema = Schema::new(vec![
        Field::new("input_ids", DType::U32, 1),
        Field::new("hidden_states", DType::Bf16, 2),
    ]);
    Spec { schema: schema.unwrap(), encoding, identity: identity() }
}

pub(crate) fn identity() -> Identity {
    Identity {
        target: TargetIdentity {
            path: "models/tiny".into(),
            architecture: "LlamaForCausalLM".into(),
            config_hash: "c0ffee".into(),
            weights_hash: "beef".into(),
            dtype: "bf16".into(),
        },
        capture: CaptureSpec { layers: vec![1, 3, 4], last_hidden: true },
        tokenizer_hash: "70ce".into(),
        template_hash: "7e3a".into(),
        prepared_hash: "9a7a".into(),
        prepared_rows: 100,
        max_length: 2048,
    }
}

/// The values of one row, made from its number.
pub(crate) struct Row {
    pub(crate) number: u64,
    pub(crate) len: u32,
    u8s: BTreeMap<String, Vec<u8>>,
    u32s: BTreeMap<String, Vec<u32>>,
    f32s: BTreeMap<String, Vec<f32>>,
    pub(crate) bf16s: BTreeMap<String, Vec<bf16>>,
}

/// A number in [0, 1) that depends on all arguments (SplitMix64).
pub(crate) fn noise(row: u64, salt: u64) -> f32 {
    let mut z =
        row.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(salt.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
}

impl Row {
    pub(crate) fn new(spec: &Spec, row: u64, len: u32) -> Self {
        let (mut u8s, mut u32s) = (BTreeMap::new(), BTreeMap::new());
        let (mut f32s, mut bf16s) = (BTreeMap::new(), BTreeMap::new());
        for (i, field) in spec.schema.fields().iter().enumerate() {
            let name = field.name.clone();
            let value = |at: u64| noise(row, at * 64 + i as u64);
            let range = 0..u64::from(len * field.width);
            match field.dtype {
                DType::U8 => drop(u8s.insert(name, range.map(|at| u8::from(value(at) > 0.5)).collect())),
                DType::U32 => drop(u32s.insert(name, range.map(|at| (value(at) * 32000.0) as u32).collect())),
                DType::F32 => drop(f32s.insert(name, range.map(|at| value(at) * 20.0).collect())),
                DType::Bf16 => {
                    drop(bf16s.insert(name, range.map(|at| bf16::from_f32(value(at) * 6.0 - 3.0)).collect()));
                }
            }
        }
        Self { number: row, len, u8s, u32s, f32s, bf16s }
    }

    pub(crate) fn fields<'a>(&'a self, spec: &'a Spec) -> Vec<(&'a str, Values<'a>)> {
        let values = |f: &'a Field| match f.dtype {
            DType::U8 => Values::U8(&self.u8s[&f.name]),
            DType::U32 => Values::U32(&self.u32s[&f.name]),
            DType::F32 => Values::F32(&self.f32s[&f.name]),
            DType::Bf16 => Values::Bf16(&self.bf16s[&f.name]),
        };
        spec.schema.fields().iter().map(|f| (f.name.as_str(), values(f))).collect()
    }

    pub(crate) fn append(&self, writer: &mut Writer, spec: &Spec) -> Result<()> {
        writer.append(self.number, self.len, &self.fields(spec))
    }

    /// Compares everything, bf16 fields bit by bit.
    pub(crate) fn assert_same(&self, record: &Record<'_>) {
        self.assert_same_but_bf16(record);
        for (name, values) in &self.bf16s {
            assert_eq!(bits(&record.field_bf16(name).unwrap()), bits(values), "row {} {name}", self.number);
        }
    }

    pub(crate) fn assert_same_but_bf16(&self, record: &Record<'_>) {
        assert_eq!((record.row(), record.len()), (self.number, self.len as usize));
        for (name, values) in &self.u8s {
            assert_eq!(record.field_u8(name).unwrap(), values);
        }
        for (name, values) in &self.u32s {
            assert_eq!(record.field_u32(name).unwrap(), values);
        }
        for (name, values) in &self.f32s {
            assert_eq!(record.field_f32(name).unwrap(), values);
        }
    }
}

pub(crate) fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Writes rows of the lengths given, numbered from 0, and finishes.
pub(crate) fn write(folder: &Path, spec: &Spec, options: &WriterOptions, lens: &[u32]) -> Vec<Row> {
    let rows: Vec<Row> = (0..).zip(lens).map(|(row, len)| Row::new(spec, row, *len)).collect();
    let mut writer = Writer::open(folder, spec, options).unwrap();
    rows.iter().for_each(|row| row.append(&mut writer, spec).unwrap());
    writer.finish().unwrap();
    rows
}

/// Name and bytes of every file of a folder.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// Writes files back, as [`files`] gave them.
pub(crate) fn put_files(folder: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).unwrap();
    }
}
