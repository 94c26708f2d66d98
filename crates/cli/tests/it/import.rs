//! `specforge import`: features of SpecForge and speculators as a store, and what is wrong with them.

use half::bf16;
use specforge_data::Prepared;
use specforge_models::{Capture, Target};
use specforge_store::Reader;
use specforge_tensor::{DType, Device};
use specforge_testkit::{SmallTarget, torch_file};

use crate::left::Left;
use crate::world::World;

const OFFLINE: [&str; 6] = ["--set", "mode=offline", "--set", "store.path=store", "--set", "name=imported"];

fn import<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["import", "R", "--from", "features"], OFFLINE.as_slice(), more].concat()
}

/// A captured store as SpecForge's files: one per row, some in other folders, padded to `pad` tokens, states of
/// padding not zero.
fn write_specforge(world: &World, store: &str, pad: usize) -> usize {
    let reader = Reader::open(world.path(store)).unwrap();
    let rows = reader.summary().rows;
    for row in 0..rows {
        let record = reader.record(row).unwrap();
        let n = record.field_u32("input_ids").unwrap().len();
        let length = n.max(pad);
        let padded = |values: Vec<i64>| -> Vec<u8> {
            let zeros = std::iter::repeat_n(0, length - n);
            values.into_iter().chain(zeros).flat_map(i64::to_le_bytes).collect()
        };
        let states = |name: &str| {
            let values = record.field_bf16(name).unwrap().into_owned();
            let width = values.len() / n;
            let junk = std::iter::repeat_n(bf16::from_f32(7.0), (length - n) * width);
            let bytes = values.into_iter().chain(junk).flat_map(bf16::to_le_bytes).collect::<Vec<u8>>();
            (vec![1, length, width], bytes)
        };
        let ids = record.field_u32("input_ids").unwrap().iter().map(|&id| id.into()).collect();
        let mask = record.field_u8("loss_mask").unwrap().iter().map(|&bit| bit.into()).collect();
        let (aux_shape, aux) = states("hidden_states");
        let (last_shape, last) = states("last_hidden");
        // Numbers that are not those of the rows.
        let number = rows - row;
        let folder = world.path(&format!("features/rows_{}", number % 3));
        fs_err::create_dir_all(&folder).unwrap();
        torch_file(
            &folder.join(format!("data_{number}.ckpt")),
            &[
                ("input_ids", "LongStorage", &[length], padded(ids)),
                ("loss_mask", "LongStorage", &[length], padded(mask)),
                ("hidden_state", "BFloat16Storage", &last_shape, last),
                ("aux_hidden_state", "BFloat16Storage", &aux_shape, aux),
            ],
        );
    }
    rows as usize
}

#[test]
fn imported_features_train_the_draft_of_captured_ones() {
    let world = World::new();
    let captured = ["--set", "mode=offline", "--set", "name=captured", "--set", "store.path=captured"];
    world.ok(&[&["capture", "R"], captured.as_slice()].concat());
    world.ok(&[&["train", "R"], captured.as_slice()].concat());
    let rows = write_specforge(&world, "captured", 80);
    let ran = world.ok(&import(&["--json", "--verify", "3"]));
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((summary["imported"].as_u64(), summary["missing"].as_u64()), (Some(rows as u64), Some(0)));
    assert_eq!((&summary["without_row"], &summary["other_masks"]), (&0.into(), &0.into()), "{summary}");
    assert!(ran.stderr.contains("layer 1 0.0e0"), "{}", ran.stderr);
    world.ok(&["info", "store", "--verify"]);
    world.ok(&[&["train", "R"], OFFLINE.as_slice()].concat());
    Left::by(&world, "imported").assert_same(&Left::by(&world, "captured"), "imported");
    // Again: everything is there.
    let again = world.ok(&import(&["--json"]));
    let again: serde_json::Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!((&again["imported"], &again["already_there"]), (&0.into(), &(rows as u64).into()));
}

#[test]
fn rows_that_files_do_not_have_are_counted_and_captured_later() {
    let world = World::new();
    world.ok(&["capture", "R", "--set", "store.path=captured"]);
    write_specforge(&world, "captured", 0);
    fs_err::remove_dir_all(world.path("features/rows_0")).unwrap();
    world.write("features/rows_1/data_999.ckpt", b"PK\x03\x04");
    let message = world.fails(&import(&[]), &["20 of 60 rows have no features", "specforge capture"]);
    assert!(message.contains("data_999.ckpt") && message.contains("left out"), "{message}");
    world.fails(&[&["train", "R"], OFFLINE.as_slice()].concat(), &["not in the store", "capture"]);
    let ran = world.ok(&[&["capture", "R"], OFFLINE.as_slice()].concat());
    assert!(ran.stderr.contains("40 of 60 rows are there already"), "{}", ran.stderr);
    world.ok(&[&["train", "R", "--set", "train.epochs=1"], OFFLINE.as_slice()].concat());
}

#[test]
fn rows_of_the_files_serve_without_the_conversations() {
    let world = World::new();
    world.ok(&["capture", "R", "--set", "store.path=captured"]);
    write_specforge(&world, "captured", 90);
    let ran = world.ok(&["import", "--from", "features", "--write-rows", "rows.jsonl"]);
    assert!(ran.stdout.contains("rows.jsonl"), "{}", ran.stdout);
    let tokens = ["--set", "data.conversations=[\"rows.jsonl\"]"];
    world.ok(&import(&tokens));
    world.ok(&[&["train", "R", "--set", "train.epochs=1"], OFFLINE.as_slice(), &tokens].concat());
}

/// What speculators' files hold: the captured layers and the last one before the final norm, in one tensor.
#[test]
fn speculators_files_get_the_final_norm() {
    let world = World::new();
    let prepared = world.ok(&["prepare", "R"]).stdout;
    let data = Prepared::open(std::path::Path::new(prepared.trim())).unwrap();
    let target = Target::load(world.path("target"), Device::Cpu, Some(DType::F32)).unwrap();
    let capture = Capture { layers: vec![1, 3, 4, 7], last_hidden: false };
    fs_err::create_dir_all(world.path("features")).unwrap();
    for (i, row) in data.rows().enumerate() {
        let states = target.forward(&[row.ids], &capture).unwrap().hidden_states.to_f32();
        let bytes = |values: Vec<[u8; 4]>| values.concat();
        let ids: Vec<u8> = row.ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
        let states = bytes(states.into_iter().map(f32::to_le_bytes).collect());
        let view = |dtype, shape: &[usize], bytes| {
            safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap()
        };
        let n = row.ids.len();
        let views = [
            ("hidden_states", view(safetensors::Dtype::F32, &[n, 4, 32], &states)),
            ("token_ids", view(safetensors::Dtype::I64, &[n], &ids)),
        ];
        let path = world.path(&format!("features/hs_{i}.safetensors"));
        safetensors::serialize_to_file(views, None, &path).unwrap();
    }
    world.ok(&import(&["--verify", "4"]));
    world.ok(&[&["train", "R", "--set", "train.epochs=1"], OFFLINE.as_slice()].concat());
    // Without the norm they are not the target's, and the comparison finds it.
    let wrong = ["--last-hidden", "normed", "--verify", "4", "--set", "store.path=wrong"];
    world.fails(&import(&wrong), &["states of last are not this target's", "--last-hidden"]);
    // Other layers neither.
    let wrong =
        ["--verify", "4", "--set", "store.path=wrong2", "--set", "method.eagle3.capture-layers=[0,2,6]"];
    world.fails(&import(&wrong), &["states of layer 0 are not this target's", "capture-layers"]);
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let world = World::new();
    world.fails(&import(&[]), &["features"]);
    fs_err::create_dir_all(world.path("features")).unwrap();
    world.fails(&import(&[]), &["no features in this folder", "data_*.ckpt"]);
    for (golden, expected) in [
        ("code.pt", "the name posix.system"),
        ("legacy.pt", "torch.save(torch.load("),
        ("plain.pt", "a plain pickle"),
    ] {
        let file = specforge_testkit::own_case("torch").join(golden);
        fs_err::copy(file, world.path("features/data_0.ckpt")).unwrap();
        world.fails(&import(&[]), &["data_0.ckpt", expected, "60 of 60 rows have no features"]);
    }
    fs_err::remove_file(world.path("features/data_0.ckpt")).unwrap();
    // Of a target of another width.
    world.ok(&["capture", "R", "--set", "store.path=captured"]);
    write_specforge(&world, "captured", 0);
    let mut narrow = SmallTarget::llama(1);
    narrow.config["hidden_size"] = 16.into();
    narrow.config["num_attention_heads"] = 1.into();
    narrow.config["num_key_value_heads"] = 1.into();
    for (_, shape, values) in &mut narrow.tensors {
        shape.iter_mut().filter(|extent| **extent == 32).for_each(|extent| *extent = 16);
        values.truncate(shape.iter().product());
    }
    narrow.write(&world.path("narrow"));
    world.fails(
        &import(&["--set", "target.path=narrow", "--set", "store.path=narrow-store"]),
        &["states of width 96", "3 layers of this target have 48"],
    );
}
