"""`azr-jax export`: the same bytes out as in, a run's weights with its model's surroundings, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from azr_jax.checkpoint import Checkpointer
from azr_jax.cli import main
from azr_jax.config import MeshConfig
from azr_jax.dist.mesh import make_mesh, replicated
from azr_jax.learn.state import TrainState, param_shardings
from azr_jax.models.config import ModelConfig
from azr_jax.models.weights import load_weights

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.parent.name for folder in GOLDEN.glob("*/config.json"))
SURROUNDINGS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "x"}',
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": [2, 3], "temperature": 0.7}',
    "LICENSE.txt": "terms",
    "additional_chat_templates/tool.jinja": "y",
}


def model(folder: Path, name: str = "qwen2_untied", dtype: str = "float32", **fields: object) -> Path:
    """A copy of a golden model in another dtype, with a tokenizer and config fields that the model does not need."""
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("expected.safetensors"))
    tensors = {key: tensor.astype(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": dtype, "eos_token_id": 2, "max_position_embeddings": 128, "use_cache": False} | fields
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    for file, text in SURROUNDINGS.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    (folder / "README.md").write_text("about the original")
    return folder


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_bytes(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes() for key in one
    )


def export(capsys, source: Path | str, out: Path, *options: str) -> dict:
    assert main(["export", str(source), "--out", str(out), *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, source: Path | str, out: Path, *options: str) -> tuple[int, str]:
    code = main(["export", str(source), "--out", str(out), *options])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hugging_face_folder_comes_out_byte_equal(name, dtype, tmp_path, capsys):
    source = model(tmp_path / "in", name, dtype)
    report = export(capsys, source, tmp_path / "out", "--max-shard-gb", "0.00002")
    assert len(report["files"]) > 1 and report["dtype"] == dtype
    assert all(Path(tmp_path / "out" / file).stat().st_size <= 20_000 for file in report["files"])
    before, after = tensors_in(source), tensors_in(tmp_path / "out")
    assert same_bytes(before, after)
    assert report["bytes"] == sum(tensor.nbytes for tensor in after.values())
    assert report["parameters"] == sum(tensor.size for tensor in after.values())
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_a_single_file_is_the_same_file(tmp_path, capsys):
    source = model(tmp_path / "in")
    assert export(capsys, source, tmp_path / "out")["files"] == ["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(name.partition("/")[0] for name in SURROUNDINGS),
        "config.json",
        "model.safetensors",
    }
    for name in SURROUNDINGS:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it_unchanged(name, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    export(capsys, model(tmp_path / "in", name, "bfloat16"), tmp_path / "out", "--max-shard-gb", "0.00002")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    state = theirs.state_dict()
    for key, tensor in tensors_in(tmp_path / "in").items():
        assert state[key].float().numpy().tobytes() == tensor.astype(np.float32).tobytes()


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_another_dtype(field, tmp_path, capsys):
    source = model(tmp_path / "in", dtype="bfloat16")
    fields = json.loads((source / "config.json").read_text())
    fields[field] = fields.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(fields))
    export(capsys, source, tmp_path / "out", "--dtype", "float32")
    assert json.loads((tmp_path / "out/config.json").read_text()) == fields | {field: "float32"}
    expected = {key: tensor.astype(np.float32) for key, tensor in tensors_in(source).items()}
    assert same_bytes(tensors_in(tmp_path / "out"), expected)


def test_every_tensor_keeps_its_own_type(tmp_path, capsys):
    source = model(tmp_path / "in", "qwen3", "bfloat16")
    mixed = tensors_in(source)
    mixed |= {key: tensor.astype(np.float32) for key, tensor in mixed.items() if "norm" in key}
    save_file(mixed, source / "model.safetensors")
    assert export(capsys, source, tmp_path / "out")["dtype"] == "bfloat16, float32"
    assert same_bytes(tensors_in(tmp_path / "out"), mixed)


def test_a_tied_head_is_not_written_twice(tmp_path, capsys):
    source = model(tmp_path / "in", "llama_tied")
    before = tensors_in(source)
    save_file(before | {"lm_head.weight": before["model.embed_tokens.weight"]}, source / "model.safetensors")
    export(capsys, source, tmp_path / "out")
    assert same_bytes(tensors_in(tmp_path / "out"), before)


def test_of_a_model_with_vision_the_language_model_is_exported(tmp_path, capsys):
    source = model(tmp_path / "in", "gemma3")
    before = tensors_in(source)
    nested = {f"language_model.{key}": tensor for key, tensor in before.items()}
    save_file(nested | {"vision_tower.w": np.ones(3, np.float32)}, source / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    fields = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (source / "config.json").write_text(json.dumps(fields | {"eos_token_id": [1, 106], "vision_config": {}}))
    export(capsys, source, tmp_path / "out")
    assert same_bytes(tensors_in(tmp_path / "out"), before)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert ModelConfig.load(tmp_path / "out") == ModelConfig.load(source)


def test_generation_settings_are_made_from_the_config_where_there_are_none(tmp_path, capsys):
    source = model(tmp_path / "in", bos_token_id=None)
    (source / "generation_config.json").unlink()
    export(capsys, source, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 2}


def test_the_embedded_model(tmp_path, capsys):
    export(capsys, "embedded", tmp_path / "out")
    config = ModelConfig.load(tmp_path / "out")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_weights(tmp_path / "out", config),
        load_weights(Path(main.__code__.co_filename).parent / "models/embedded", config),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 2 and 10, made on a mesh of eight; weights are the model's + step."""
    root = tmp_path_factory.mktemp("run")
    folder = model(root / "model", "qwen2_tied", "bfloat16")
    config, mesh = ModelConfig.load(folder), make_mesh(MeshConfig(1, 4, 2))
    checkpoints, counter = Checkpointer(root / "run/checkpoints", 3), jax.device_put(jnp.int32(7), replicated(mesh))
    for step in (2, 10):
        params = jax.tree.map(lambda w: w + step, load_weights(folder, config, param_shardings(config, mesh)))  # noqa: B023
        assert not params["embed"].is_fully_replicated
        moments = {"mu": jax.tree.map(jnp.zeros_like, params), "count": counter}
        checkpoints.save(step, TrainState(params, moments, counter, counter), {"buffers": []})
    checkpoints.wait()
    scores = [{"step": n, "eval/sampled/pooled": score} for n, score in ((0, 0.9), (2, 0.5), (10, 0.4))]
    (root / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (root / "run/config.yaml").write_text(f"model: {folder}\nsteps: 10\n")
    return root / "run"


@pytest.mark.parametrize(
    ("source", "options", "step"),
    [
        ("", [], 10),
        ("", ["--step", "2"], 2),
        ("", ["--step", "best"], 2),
        ("checkpoints", [], 10),
        ("checkpoints/step_000002", [], 2),
        ("checkpoints/step_000002", ["--step", "2"], 2),
    ],
)
def test_weights_of_a_run(run, source, options, step, tmp_path, capsys):
    report = export(capsys, run / source, tmp_path / "out", *options)
    assert report["step"] == step and report["source"].endswith(f"step_{step:06d}")
    assert (tmp_path / "out/chat_template.jinja").exists()
    original = tensors_in(run.parent / "model")
    expected = {key: (w.astype(np.float32) + step).astype(w.dtype) for key, w in original.items()}
    assert same_bytes(tensors_in(tmp_path / "out"), expected)  # bfloat16, as the run's model


def test_weights_of_a_run_in_full(run, tmp_path, capsys):
    export(capsys, run, tmp_path / "out", "--dtype", "float32")
    original = tensors_in(run.parent / "model")
    assert same_bytes(tensors_in(tmp_path / "out"), {key: w.astype(np.float32) + 10 for key, w in original.items()})
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("dear")
    code, error = refusal(capsys, "embedded", tmp_path / "out")
    assert code == 2 and "is no empty folder" in error
    code, error = refusal(capsys, "embedded", tmp_path / "out/mine")
    assert code == 2 and (tmp_path / "out/mine").read_text() == "dear"


def test_an_empty_folder_will_do(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    export(capsys, "embedded", tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file() and (tmp_path / "out/model.safetensors").is_file()


def test_what_is_no_source(run, tmp_path, capsys):
    code, error = refusal(capsys, tmp_path / "nothing", tmp_path / "out")
    assert code == 2 and "neither a run folder" in error
    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.yaml").write_text("model: embedded\n")
    assert "holds no checkpoint yet" in refusal(capsys, tmp_path / "young", tmp_path / "out")[1]
    assert "no checkpoint of step 3; it has 2, 10" in refusal(capsys, run, tmp_path / "out", "--step", "3")[1]
    newest = run / "checkpoints/step_000010"
    assert "is the checkpoint of step 10" in refusal(capsys, newest, tmp_path / "out", "--step", "2")[1]
    assert "its weights have no steps" in refusal(capsys, "embedded", tmp_path / "out", "--step", "2")[1]
    assert not (tmp_path / "out").exists()


def test_a_run_whose_model_is_gone(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "moved/config.yaml").write_text(f"model: {tmp_path / 'gone'}\n")
    code, error = refusal(capsys, tmp_path / "moved", tmp_path / "out")
    assert code == 1 and f"started with model '{tmp_path / 'gone'}'" in error and "put it back" in error
    for text in ("steps: 3\n", "[torn", "[]"):
        (tmp_path / "moved/config.yaml").write_text(text)
        assert "does not say which model" in refusal(capsys, tmp_path / "moved", tmp_path / "out")[1]


def test_a_run_of_another_model_is_named(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "moved/config.yaml").write_text("model: embedded\n")
    code, error = refusal(capsys, tmp_path / "moved", tmp_path / "out")
    assert code == 1 and "does not fit this configuration" in error
    assert not any((tmp_path / "out").iterdir())


def test_a_damaged_checkpoint_is_not_exchanged_for_an_older_one(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "damaged")
    for file in (tmp_path / "damaged/checkpoints/step_000010/state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            content = bytearray(file.read_bytes())
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            file.write_bytes(content)
    code, error = refusal(capsys, tmp_path / "damaged", tmp_path / "out")
    assert code == 1 and "step_000010 is damaged" in error and "Traceback" not in error
    assert not any((tmp_path / "out").iterdir()), "nothing half-done is left"


def test_a_full_disk_is_noticed_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    code, error = refusal(capsys, "embedded", tmp_path / "out")
    assert code == 1 and "the disk has less" in error and not any((tmp_path / "out").iterdir())
