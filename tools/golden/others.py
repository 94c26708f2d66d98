"""Makes tests/golden/others/ with the packages that write such files; the README there says how to run it.

usage: others.py speculators-0.9.0 | speculators-0.3.0 | specforge-0.2.0
"""

import gzip
import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

WIDTH, LAYERS, TOKENS = 16, 4, 5
HERE = pathlib.Path(__file__).parents[2] / "tests/golden/others"
SCRATCH = pathlib.Path("/tmp/specforge-others")
DRAFT_TOKENS = list(range(3, 43, 2))


def states():
    """[tokens, layers, width]: whole numbers from 8 to 15, the largest 28 = 448 / 16: exact in 8 bits with a scale."""
    i = torch.arange(TOKENS * LAYERS * WIDTH).reshape(TOKENS, LAYERS, WIDTH)
    numbers = (8 + i % 8).float()
    numbers[:, 0, 0] = 28.0
    return numbers


def token_ids():
    return torch.arange(7, 7 + TOKENS)


def vocabulary(size):
    t2d = torch.zeros(size, dtype=torch.bool)
    t2d[DRAFT_TOKENS] = True
    d2t = torch.tensor([token - i for i, token in enumerate(DRAFT_TOKENS)])
    return t2d, d2t


def target():
    """A target to draft for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=48, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    )
    folder = SCRATCH / "target"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def speculators_9(out):
    from datasets import Dataset
    from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
    from speculators import Eagle3DraftModel
    from speculators.data_generation.offline import check_hidden_states
    from speculators.train.checkpointer import SingleGPUCheckpointer
    from speculators.train.cli import create_transformer_layer_config

    verifier = target()
    t2d, d2t = vocabulary(48)
    # Their own defaults, and a draft that is served the same way everywhere.
    drafts = {
        "eagle3-qwen3": dict(arch="qwen3", full=[0], norm_before_residual=False, norm_output=True),
        "eagle3-default": dict(arch="llama", full=[], norm_before_residual=True, norm_before_fc=True, norm_output=True),
        "eagle3-plain": dict(arch="llama", full=[0], norm_before_residual=False, fc_norm=True, norm_output=True),
    }
    for name, draft in drafts.items():
        torch.manual_seed(2)
        layer = create_transformer_layer_config(
            verifier, num_layers=1, draft_arch=draft.pop("arch"), hidden_act=None, sliding_window=2048,
            full_attention_indices=draft.pop("full"),
        )
        model = Eagle3DraftModel.from_training_args(
            verifier_config=layer, t2d=t2d, d2t=d2t, draft_vocab_size=len(DRAFT_TOKENS), ttt_steps=3,
            verifier_name_or_path=verifier, target_layer_ids=None, draft_attn_impl="eager", **draft,
        )
        checkpoints = SCRATCH / name
        optimizer = torch.optim.AdamW(model.parameters())
        SingleGPUCheckpointer(checkpoints).save_checkpoint(model, optimizer, 0)
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in ["config.json", "model.safetensors"]:
            (out / name / file).write_bytes((checkpoints / "0" / file).read_bytes())

    features = out / "hidden_states"
    features.mkdir(exist_ok=True)
    plain = {"hidden_states": states().bfloat16(), "token_ids": token_ids()}
    check_hidden_states(plain, token_ids().tolist())
    save_file(plain, features / "hs_0.safetensors")
    small, scales = quantize_tensor_to_fp8(states())
    save_file({**plain, "hidden_states": small, SCALES_KEY: scales}, features / "hs_1.safetensors")
    mask = (token_ids() % 2).tolist()
    rows = {"input_ids": [token_ids().tolist()], "loss_mask": [mask], "seq_len": [TOKENS]}
    Dataset.from_dict(rows).with_format("torch").save_to_disk(out / "dataset")


def eagle3_of_3(out):
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    torch.manual_seed(4)
    layer = LlamaConfig(
        vocab_size=48, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=5e5,
    )
    # The target that speculators-0.9.0 made: its configuration has no place for the scaling, which older versions ignore.
    verifier = VerifierConfig(name_or_path=str(SCRATCH / "target"), architectures=["LlamaForCausalLM"])
    described = SpeculatorsConfig(
        algorithm="eagle3", proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy", verifier=verifier,
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=len(DRAFT_TOKENS), speculators_config=described,
    )
    t2d, d2t = vocabulary(48)
    model = Eagle3DraftModel(config, t2d=t2d, d2t=d2t)
    model.to(torch.bfloat16).save_pretrained(out / "eagle3")


def speculators_3(out):
    from speculators.train.data import Eagle3SampleFileDataset, standardize_data_v0, standardize_data_v1

    out.mkdir(exist_ok=True)
    mask = token_ids() % 2
    layers = list(states().bfloat16().unbind(1))
    torch.save({"input_ids": token_ids(), "hidden_states": layers, "loss_mask": mask}, out / "data_0.pt")
    wide = states().bfloat16()
    old = {"input_ids": token_ids(), "loss_mask": mask, "hidden_state": wide[:, :-1].flatten(1), "target": wide[:, -1]}
    (out / "v0").mkdir(exist_ok=True)
    torch.save(old, out / "v0" / "data_0.pt")
    eagle3_of_3(out)
    for folder, standard in [("v0", standardize_data_v0), (".", standardize_data_v1)]:
        row = Eagle3SampleFileDataset(64, file_list=[str(out / folder / "data_0.pt")], standardize_fn=standard)[0]
        print(folder, {key: tuple(value.shape) for key, value in row.items()})


def specforge(out):
    from specforge.export.to_hf import export_to_hf
    from specforge.export.to_sglang import export_to_sglang
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
    from specforge.runtime.data_plane.feature_store import load_feature_file
    from specforge.training.checkpoint import CheckpointManager

    folder = target()
    t2d, d2t = vocabulary(48)
    draft = json.loads((pathlib.Path(folder) / "config.json").read_text())
    draft |= {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": len(DRAFT_TOKENS)}
    (SCRATCH / "draft.json").write_text(json.dumps(draft))
    torch.manual_seed(3)
    model = AutoDraftModel.from_config(AutoDraftModelConfig.from_file(str(SCRATCH / "draft.json")))
    model = model.to(torch.bfloat16)
    model.t2d.copy_(t2d)
    model.d2t.copy_(d2t)
    kept = {key: value for key, value in model.state_dict().items() if "embed" not in key.lower()}
    state = {"draft_state_dict": kept, "global_step": 10, "epoch": 0, "strategy": "eagle3", "run_id": "run"}
    manager = CheckpointManager(str(out), "run")
    step = out / "run-step10"
    step.mkdir(parents=True, exist_ok=True)
    manager._atomic_save(state, str(step / "training_state.pt"))
    export_to_hf(str(step), str(SCRATCH / "draft.json"), str(out / "hf"), embedding_source=folder)
    export_to_sglang(str(step), str(SCRATCH / "draft.json"), str(out / "sglang"))

    rows = out / "rows_0-2000"
    rows.mkdir(exist_ok=True)
    wide = states().bfloat16()
    row = {
        "input_ids": token_ids(), "loss_mask": token_ids() % 2,
        "hidden_state": wide[:, -1].unsqueeze(0), "aux_hidden_state": wide[:, :-1].flatten(1).unsqueeze(0),
    }
    torch.save(row, rows / "data_0.ckpt")
    with gzip.GzipFile(rows / "data_1.ckpt.gz", "wb", 6, mtime=0) as file:
        torch.save(row, file)
    for path in sorted(rows.iterdir()):
        print(path.name, {key: tuple(value.shape) for key, value in load_feature_file(str(path)).items()})


MAKERS = {"speculators-0.9.0": speculators_9, "speculators-0.3.0": speculators_3, "specforge-0.2.0": specforge}

if __name__ == "__main__":
    MAKERS[sys.argv[1]](HERE / sys.argv[1])
