//! Packing, determinism, storage types, and what a capture costs.

use serde_json::json;
use specforge_models::{Capture, Target};
use specforge_tensor::{DType, Device};
use specforge_testkit::{assert_close, tempdir};

use crate::folder::{all, close, config, kinds, target, tensors, tokens, write};

#[test]
fn a_packed_batch_equals_its_documents_alone() {
    for (architecture, extra) in kinds() {
        let target = target(architecture, &extra);
        let documents: Vec<Vec<u32>> = [5, 1, 17, 40].iter().map(|&n| tokens(n as u64, n)).collect();
        let views: Vec<&[u32]> = documents.iter().map(Vec::as_slice).collect();
        let packed = target.forward(&views, &all(&target)).unwrap();
        let width = packed.hidden_states.rows_cols().1;
        for (document, rows) in views.iter().zip(&packed.bounds) {
            let alone = target.forward(&[document], &all(&target)).unwrap();
            let got = &packed.hidden_states.f32s()[rows.start * width..rows.end * width];
            close(architecture, got, &alone.hidden_states.f32s());
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let target = target("Qwen3ForCausalLM", &json!({}));
    let tokens = tokens(3, 60);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| target.forward(&[&tokens], &all(&target)).unwrap())
    };
    let (one, four) = (run(1), run(4));
    assert_eq!(one.hidden_states.f32s(), four.hidden_states.f32s());
    assert_eq!(one.last_hidden.unwrap().f32s(), four.last_hidden.unwrap().f32s());
}

#[test]
fn what_ran_before_changes_no_bit() {
    for (architecture, extra) in kinds() {
        let target = target(architecture, &extra);
        let short = tokens(1, 7);
        let before = target.forward(&[&short], &all(&target)).unwrap();
        target.forward(&[&tokens(2, 64)], &all(&target)).unwrap();
        let after = target.forward(&[&short], &all(&target)).unwrap();
        assert_eq!(before.hidden_states.f32s(), after.hidden_states.f32s(), "{architecture}");
    }
}

#[test]
fn only_what_is_asked_for_is_captured() {
    let target = target("LlamaForCausalLM", &json!({}));
    let (tokens, h) = (tokens(4, 9), target.info().hidden_size);
    let full = target.forward(&[&tokens], &all(&target)).unwrap();
    let some = target.forward(&[&tokens], &Capture { layers: vec![0, 2], last_hidden: false }).unwrap();
    assert!(some.last_hidden.is_none());
    assert_eq!(some.hidden_states.shape(), [9, 2 * h]);
    let (full, some) = (full.hidden_states.to_f32(), some.hidden_states.to_f32());
    for r in 0..9 {
        assert_eq!(some[r * 2 * h..][..h], full[r * 3 * h..][..h]);
        assert_eq!(some[r * 2 * h + h..][..h], full[r * 3 * h + 2 * h..][..h]);
    }
}

#[test]
fn weights_are_stored_as_asked_for() {
    let dir = tempdir();
    let config = config("LlamaForCausalLM", &json!({}));
    write(dir.path(), &config, &tensors(&config));
    let load = |storage| Target::load(dir.path(), Device::Cpu, storage).unwrap();
    let (stored, half, f16) = (load(None), load(Some(DType::Bf16)), load(Some(DType::F16)));
    assert_eq!(
        [stored.head().dtype(), half.head().dtype(), f16.embedding().dtype()],
        [DType::F32, DType::Bf16, DType::F16]
    );
    assert_eq!(half.head().to_bf16(), stored.head().to_bf16());
    let last = |target: &Target| {
        target.forward(&[&tokens(5, 20)], &all(target)).unwrap().last_hidden.unwrap().to_f32()
    };
    let (exact, rounded, finer) = (last(&stored), last(&half), last(&f16));
    assert_ne!(exact, rounded);
    assert_close("bf16", &rounded, &exact, 0.15, 0.0);
    assert_close("f16", &finer, &exact, 0.02, 0.0);
}

#[test]
fn tied_targets_share_the_embedding() {
    let tied = target("LlamaForCausalLM", &json!({ "tie_word_embeddings": true }));
    assert_eq!(tied.head().to_f32(), tied.embedding().to_f32());
    let untied = target("LlamaForCausalLM", &json!({}));
    assert_ne!(untied.head().to_f32(), untied.embedding().to_f32());
}

#[test]
fn a_window_hides_what_is_far() {
    let window = json!({ "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 0 });
    let windowed = target("Qwen2ForCausalLM", &window);
    let switched_off = target("Qwen2ForCausalLM", &json!({ "sliding_window": 4 }));
    let capture = Capture { layers: vec![0], last_hidden: false };
    let (mut a, last) = (tokens(6, 12), 11 * 32);
    let first =
        |target: &Target, tokens: &[u32]| target.forward(&[tokens], &capture).unwrap().hidden_states.to_f32();
    let (near, far) = (first(&windowed, &a), first(&switched_off, &a));
    assert_ne!(near[last..], far[last..]);
    // The last row sees four keys, itself among them: what stands before does not matter.
    a[7] = (a[7] + 1) % 50;
    assert_eq!(first(&windowed, &a)[last..], near[last..]);
    assert_ne!(first(&switched_off, &a)[last..], far[last..]);
    a[8] = (a[8] + 1) % 50;
    assert_ne!(first(&windowed, &a)[last..], near[last..]);
}

#[test]
fn layer_types_decide_which_layers_have_the_window() {
    let types = |types: [&str; 3]| {
        target(
            "Qwen3ForCausalLM",
            &json!({ "use_sliding_window": true, "sliding_window": 4, "layer_types": types }),
        )
    };
    let by_types = types(["full_attention", "sliding_attention", "sliding_attention"]);
    let by_number = json!({ "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1 });
    let last = |t: &Target| t.forward(&[&tokens(8, 30)], &all(t)).unwrap().last_hidden.unwrap().to_f32();
    assert_eq!(last(&by_types), last(&target("Qwen3ForCausalLM", &by_number)));
    assert_ne!(last(&by_types), last(&types(["full_attention"; 3])));
}

/// With a vision tower beside it a language model has another name, and so have its tensors.
#[test]
fn composite_checkpoints_are_their_language_models() {
    let pairs = [
        (
            "Llama4ForCausalLM",
            "Llama4ForConditionalGeneration",
            "language_model.model",
            "language_model.lm_head",
        ),
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "model.language_model", "lm_head"),
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration", "model.language_model", "lm_head"),
    ];
    for (plain, composite, body, head) in pairs {
        let (_, extra) = kinds().into_iter().find(|(name, _)| *name == plain).unwrap();
        let text = config(plain, &extra);
        let renamed = |(name, shape): (String, Vec<usize>)| {
            let name = match name.strip_prefix("model") {
                Some(rest) => format!("{body}{rest}"),
                None => name.replace("lm_head", head),
            };
            (name, shape)
        };
        let mut tensors: Vec<_> = tensors(&text).into_iter().map(renamed).collect();
        tensors.push(("model.visual.patch_embed.weight".to_owned(), vec![3, 3]));
        let dir = tempdir();
        let whole = json!({ "architectures": [composite], "text_config": text, "vision_config": {} });
        write(dir.path(), &whole, &tensors);
        let composite = Target::load(dir.path(), Device::Cpu, None).unwrap();
        let last = |t: &Target| t.forward(&[&tokens(3, 20)], &all(t)).unwrap().last_hidden.unwrap().to_f32();
        assert_eq!(last(&composite), last(&target(plain, &extra)), "{plain}");
        assert_eq!(composite.info().architecture, whole["architectures"][0].as_str().unwrap());
    }
}
