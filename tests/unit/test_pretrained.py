"""Promises of saved models: they come back as they were, with tokenizer, figures and card, and can be shared."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from rxt_platform import RxTAlpha, RxTAlphaDecoder, RxTEncoder, load_tokenizer_from_hf_hub
from rxt_platform.config.model import HeadConfig
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError, RxtError
from rxt_platform.model.figures import Figures, read_figures, weights_hash
from rxt_platform.model.files import save_model
from rxt_platform.model.parameters import measure_size
from rxt_platform.storage.directory import MANIFEST, commit_directory
from tests.unit.helpers import tiny_config, tiny_model, word_tokenizer

CONFIG = tiny_config(vocab_size=300, max_length=64)
LAYOUT = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
FIGURES: dict[str, Any] = {
    "name": "toys",
    "answer_tokens": {"loss": 0.511, "perplexity": 1.667, "accuracy": 0.812, "count": 4242},
    "memory_reset": {"loss": 1.511, "perplexity": 4.531, "accuracy": 0.404, "count": 4242},
    "recall": {
        "1": {"with_memory": 0.9, "reset": 0.125, "gain": 0.775, "count": 30},
        "3": {"with_memory": 0.5, "reset": 0.6, "gain": -0.1, "count": 10},
    },
    "stages": [
        {
            "name": "joint",
            "kind": "joint_pretraining",
            "status": "made",
            "seconds": 61.0,
            "steps": 1200,
            "loss_before": 6.543,
            "loss_after": 1.234,
            "baselines": {"unigram": 4.321, "bigram": 2.109, "tokens": 5000},
        }
    ],
}

Face = RxTAlpha | RxTEncoder


def shown(figures: Figures | None) -> dict[str, Any]:
    """Figures without what binds them to their weights."""
    assert figures is not None
    return figures.model_dump(exclude={"weights"})


MEASURED = shown(Figures.model_validate(FIGURES))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A committed model, as a run leaves it."""
    path = tmp_path / "artifacts" / "memory_aware-0123"
    with commit_directory(path, "model") as folder:
        save_model(folder, CONFIG, tiny_model(CONFIG).state_dict(), word_tokenizer())
        (folder / "history.jsonl").write_text("{}\n")
    return path


@pytest.fixture
def run_folder(tmp_path: Path, artifact: Path) -> Path:
    """The folder of the run that made it."""
    folder = tmp_path / "runs" / "toys"
    folder.mkdir(parents=True)
    report = {**FIGURES, "seed": 0, "model": str(artifact), "recall_overall": {}, "samples": [], "corpus": {}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def alpha(kind: type[RxTAlpha] = RxTAlpha, seed: int = 0) -> RxTAlpha:
    return kind(tiny_model(CONFIG, seed), word_tokenizer())


def face(name: str) -> Face:
    """One of the three models to hold, untrained."""
    if name == "RxTEncoder":
        return RxTEncoder(CONFIG, HeadConfig(kind="value"), word_tokenizer())
    return alpha({"RxTAlpha": RxTAlpha, "RxTAlphaDecoder": RxTAlphaDecoder}[name])


FACES = ("RxTAlpha", "RxTAlphaDecoder", "RxTEncoder")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def change_tensors(directory: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(directory / "model.safetensors"), **tensors}, directory / "model.safetensors")


# ---- saving and loading


@pytest.mark.parametrize("name", FACES)
def test_a_saved_model_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = face(name)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(tensor.dtype == state[key].dtype for key, tensor in model.state_dict().items())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("Tom has a red hat.") == word_tokenizer().encode("Tom has a red hat.")
    assert loaded.figures is None
    loaded.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "saved")


@pytest.mark.parametrize("name", FACES)
def test_a_saved_model_is_laid_out_as_the_hub_has_it(name: str, tmp_path: Path) -> None:
    face(name).save_pretrained(tmp_path)
    assert set(content(tmp_path)) == LAYOUT
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("reactive-transformer", [name])
    own = config["model"] if name == "RxTEncoder" else config
    assert (own["vocab_size"], own["hidden_size"], own["memory"]["slots"]) == (300, 32, 8)


def test_a_model_is_loaded_in_the_precision_asked_for(tmp_path: Path) -> None:
    model = alpha()
    model.save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name
    loaded.save_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in RxTAlpha.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_the_parts_of_a_loaded_model_are_one_model(tmp_path: Path) -> None:
    alpha().save_pretrained(tmp_path)
    loaded = RxTAlpha.from_pretrained(tmp_path)
    assert all(p.requires_grad for p in loaded.parameters()), "it can be trained on"
    assert sum(p.numel() for p in loaded.model.parameters()) > measure_size(CONFIG).total.parameters > 0
    assert loaded.model.config == CONFIG


def test_a_model_is_saved_with_its_tokenizer_or_not_at_all(tmp_path: Path) -> None:
    model = RxTAlpha(tiny_model(CONFIG))
    with pytest.raises(DataError, match="no tokenizer: use set_tokenizer"):
        model.save_pretrained(tmp_path)
    assert not set(content(tmp_path)) & LAYOUT
    model.set_tokenizer(word_tokenizer())
    model.save_pretrained(tmp_path)
    assert load_tokenizer_from_hf_hub(tmp_path).vocab_size == 300


@pytest.mark.parametrize("place", ["artifact", "run_folder"])
def test_a_tokenizer_is_found_where_the_model_is(place: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer_from_hf_hub(request.getfixturevalue(place))
    assert tokenizer.encode("Tom has a red hat.") == word_tokenizer().encode("Tom has a red hat.")


# ---- what a run made


def test_a_run_s_folder_is_its_last_model_with_its_figures(run_folder: Path, artifact: Path) -> None:
    loaded, bare = RxTAlpha.from_pretrained(run_folder), RxTAlpha.from_pretrained(artifact)
    assert all(torch.equal(tensor, bare.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert shown(loaded.figures) == MEASURED
    assert bare.figures is None


def test_figures_survive_every_further_save(run_folder: Path, tmp_path: Path) -> None:
    RxTAlpha.from_pretrained(run_folder).save_pretrained(tmp_path / "first")
    assert set(content(tmp_path / "first")) == {*LAYOUT, "figures.json"}
    assert shown(read_figures(tmp_path / "first")) == MEASURED
    again = RxTAlpha.from_pretrained(tmp_path / "first")
    assert shown(again.figures) == MEASURED
    again.save_pretrained(tmp_path / "second")
    assert content(tmp_path / "second") == content(tmp_path / "first")


def test_a_run_s_artifact_that_was_altered_is_refused_by_its_file(run_folder: Path, artifact: Path) -> None:
    weights = artifact / "model.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    for place in (run_folder, artifact):
        with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256 .* the file was altered"):
            RxTAlpha.from_pretrained(place)


@pytest.mark.parametrize("name", FACES)
def test_saving_into_a_run_s_artifact_is_refused(name: str, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="made by a run, and must stay as it is; save somewhere else"):
        face(name).save_pretrained(artifact)


@pytest.mark.parametrize("why", ["artifact", "no tokenizer"])
def test_a_refused_save_leaves_what_was_there(why: str, artifact: Path) -> None:
    model = alpha(seed=1)
    if why == "no tokenizer":
        (artifact / MANIFEST).unlink()
        model.tokenizer = None
    before = content(artifact)
    with pytest.raises(RxtError):
        model.save_pretrained(artifact)
    assert content(artifact) == before


def test_a_model_saved_over_another_has_none_of_its_figures(run_folder: Path, tmp_path: Path) -> None:
    RxTAlpha.from_pretrained(run_folder).save_pretrained(tmp_path / "saved")
    alpha(seed=1).save_pretrained(tmp_path / "saved")
    assert set(content(tmp_path / "saved")) == LAYOUT
    assert RxTAlpha.from_pretrained(tmp_path / "saved").figures is None
    assert "toys" not in (tmp_path / "saved/README.md").read_text()


def test_a_card_written_by_hand_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Ours\n")
    alpha().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Ours\n"
    assert set(content(tmp_path)) == LAYOUT


def test_a_place_that_cannot_be_written_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ArtifactError, match="file/saved: cannot be written"):
        alpha().save_pretrained(tmp_path / "file" / "saved")


# ---- the card


def test_the_card_holds_the_measured_figures_for_readers_and_for_the_hub(run_folder: Path, tmp_path: Path) -> None:
    RxTAlpha.from_pretrained(run_folder).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.library_name == "rxt-platform"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "toys"
    assert {"reactive-transformer", "memory"} <= set(card.data.tags)
    results = card.data.eval_results
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("perplexity", "Answer-token perplexity", 1.667),
        ("accuracy", "Answer-token accuracy", 0.812),
        ("memory_gain", "Memory gain at distance 1", 0.775),
        ("memory_gain", "Memory gain at distance 3", -0.1),
    ]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in card.text.splitlines()]
    for row in (
        ["1", "90.0%", "12.5%", "+0.775", "30"],
        ["3", "50.0%", "60.0%", "-0.100", "10"],
        ["with memory", "0.511", "1.667", "81.2%", "4,242"],
        ["memory reset", "1.511", "4.531", "40.4%", "4,242"],
        ["joint", "1200", "loss", "6.543", "1.234"],
        ["Window of one interaction", "64 tokens"],
        ["Memory", "2 layers x 8 slots x 32"],
        ["Parameters", f"{measure_size(CONFIG).total.parameters:,} without the MLM head"],
    ):
        assert row in rows


@pytest.mark.parametrize("name", FACES)
def test_the_card_of_an_unmeasured_model_says_so(name: str, tmp_path: Path) -> None:
    face(name).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert "Nothing was measured of this model." in card.text


@pytest.mark.parametrize("name", FACES)
def test_the_code_on_the_card_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    face(name).save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert "PATH_OR_NAME" in code
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code.replace("PATH_OR_NAME", str(tmp_path)), names)
    assert type(names["model"]).__name__ == name
    if name == "RxTEncoder":
        assert names["values"].shape == (1, 1)
    else:
        assert capsys.readouterr().out.strip()


def test_an_encoder_with_a_new_head_has_no_figures_of_a_conversation(run_folder: Path, tmp_path: Path) -> None:
    RxTEncoder.from_pretrained(run_folder, head={"kind": "value"}).save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved/README.md")
    assert card.data.eval_results is None
    assert "Nothing was measured of this model." in card.text


# ---- the Hub


class RecordingHub:
    """Stands in for the Hub's client, which can't be reached from tests: keeps what would be uploaded."""

    calls: list[tuple[str, dict[str, Any]]]
    copy: Path

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, **options: Any) -> Any:
        self.calls.append(("create_repo", options))
        return type("Repo", (), {"repo_id": options["repo_id"]})

    def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
        shutil.copytree(folder_path, self.copy)
        self.calls.append(("upload_folder", options))
        return "https://huggingface.co/someone/toys/commit/1"


@pytest.mark.parametrize("name", FACES)
def test_pushing_uploads_exactly_the_saved_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordingHub, "calls", [], raising=False)
    monkeypatch.setattr(RecordingHub, "copy", tmp_path / "uploaded", raising=False)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", RecordingHub)
    model = face(name)
    if name == "RxTAlpha":
        model.figures = Figures(**FIGURES, weights=weights_hash(model.weights()))
    model.save_pretrained(tmp_path / "saved")
    assert model.push_to_hub("someone/toys", private=True, token="secret").endswith("/commit/1")
    assert [call for call, _ in RecordingHub.calls] == ["token", "create_repo", "upload_folder"]
    (_, token), (_, repo), (_, upload) = RecordingHub.calls
    assert token == {"token": "secret"}
    assert (repo["repo_id"], repo["private"]) == ("someone/toys", True)
    assert (upload["repo_id"], upload["repo_type"]) == ("someone/toys", "model")
    assert set(content(tmp_path / "uploaded")) == LAYOUT | ({"figures.json"} if model.figures else set())
    assert content(tmp_path / "uploaded") == content(tmp_path / "saved")


def test_a_model_in_the_hub_s_cache_is_loaded_by_its_name_and_revision(run_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--toys"
    RxTAlpha.from_pretrained(run_folder).save_pretrained(repository / "snapshots" / ("ab" * 20))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("ab" * 20)
    place: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True, "revision": "v1"}
    loaded, bare = RxTAlpha.from_pretrained("someone/toys", **place), RxTAlpha.from_pretrained(run_folder)
    assert all(torch.equal(tensor, bare.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert shown(loaded.figures) == MEASURED
    assert load_tokenizer_from_hf_hub("someone/toys", **place).vocab_size == 300
    with pytest.raises(ArtifactError, match="someone/toys: no such directory, and not to be had from the Hub"):
        RxTAlpha.from_pretrained("someone/toys", **{**place, "revision": "v2"})


@pytest.mark.parametrize("name", ["someone/toys", "toys", "not a name/at all", "../nowhere/at/all"])
def test_a_name_that_is_nowhere_is_one_line_that_says_so(name: str, tmp_path: Path) -> None:
    for load in (RxTAlpha.from_pretrained, RxTEncoder.from_pretrained, load_tokenizer_from_hf_hub):
        with pytest.raises(ArtifactError) as raised:
            load(name, local_files_only=True, cache_dir=tmp_path)
        message = str(raised.value)
        assert message.startswith(f"{name}: no such directory, and not to be had from the Hub: ")
        assert "\n" not in message


def test_the_hub_s_long_answers_are_cut_to_their_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:  # the Hub can't be asked from a test; its errors are OSErrors
        raise OSError("404 Client Error. (Request ID: 1)\n\nRepository Not Found for url: https://huggingface.co")

    monkeypatch.setattr("rxt_platform.model.pretrained.snapshot_download", refuse)
    with pytest.raises(ArtifactError) as raised:
        RxTAlpha.from_pretrained("someone/toys")
    message = "someone/toys: no such directory, and not to be had from the Hub: 404 Client Error. (Request ID: 1)"
    assert str(raised.value) == message


# ---- damaged files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory that anybody may have written."""
    alpha().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "", "\x00\x01", '{"model_type": "llama"}'])
def test_a_configuration_that_is_none_is_named(text: str, saved: Path) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"config\.json: not a model configuration"):
        RxTAlpha.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "figures.json"])
def test_json_nested_too_deeply_is_named(name: str, saved: Path) -> None:
    (saved / name).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ArtifactError, match=name):
        RxTAlpha.from_pretrained(saved)


def test_an_unknown_key_of_the_configuration_is_named(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "hidden_sise": 64}))
    with pytest.raises(ArtifactError, match=r"config\.json: not a model configuration: .*\nhidden_sise"):
        RxTAlpha.from_pretrained(saved)


def test_another_model_s_weights_are_refused_with_what_is_missing_and_what_is_too_much(saved: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(ArtifactError) as raised:
        RxTAlpha.from_pretrained(saved)
    missing, unknown = re.findall(r"\[.*?\]", str(raised.value))
    assert unknown == "['lm_head.weight']"
    assert missing.count("'") == 10, "the first five"
    assert f"and {len(tiny_model(CONFIG).state_dict()) - 5} more" in str(raised.value)


def test_a_tensor_of_another_kind_is_named(saved: Path) -> None:
    change_tensors(saved, **{"decoder.head.bias": torch.zeros(300, dtype=torch.int64)})
    with pytest.raises(ArtifactError, match=r"decoder\.head\.bias is torch\.int64, the model has torch\.float32"):
        RxTAlpha.from_pretrained(saved)


def test_the_wrong_face_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"without an encoder head; choose one, such as head=\{'kind': 'value'\}"):
        RxTEncoder.from_pretrained(saved)
    face("RxTEncoder").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ArtifactError, match=r"config\.json: holds \[\'RxTEncoder\'\], not RxTAlpha"):
        RxTAlpha.from_pretrained(tmp_path / "encoder")


def test_a_tokenizer_that_is_not_the_model_s_is_named(saved: Path) -> None:
    RxtTokenizer.train([" ".join(f"word{i}" * 3 for i in range(60))], 310).save(saved / "tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: 310 tokens, the model has 300: not its own"):
        RxTAlpha.from_pretrained(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer_from_hf_hub(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "toys"}', "{"])
def test_figures_that_are_none_are_named(text: str, saved: Path) -> None:
    (saved / "figures.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"figures\.json: not figures of a model"):
        RxTAlpha.from_pretrained(saved)


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": null}', "{", '{"model": "gone"}'])
def test_a_report_that_names_no_model_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"report\.json: not a run's report|gone: no such model directory"):
        RxTAlpha.from_pretrained(tmp_path)


# ---- what must not happen


def test_a_run_s_folder_is_not_saved_into(run_folder: Path) -> None:
    """Its report names another model, which would be the one that is loaded."""
    before = content(run_folder)
    with pytest.raises(ArtifactError, match="made by a run"):
        alpha(seed=1).save_pretrained(run_folder)
    assert content(run_folder) == before


def test_figures_leave_with_the_weights_that_were_measured(run_folder: Path, tmp_path: Path) -> None:
    model = RxTAlpha.from_pretrained(run_folder)
    assert model.figures is not None
    model.model.decoder.head.bias.data += 1.0
    model.save_pretrained(tmp_path / "changed")
    assert "Nothing was measured" in (tmp_path / "changed/README.md").read_text()
    assert RxTAlpha.from_pretrained(run_folder, dtype=torch.bfloat16).figures is None
    RxTAlpha.from_pretrained(run_folder).save_pretrained(tmp_path / "same")
    alpha(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").replace(tmp_path / "same/model.safetensors")
    assert RxTAlpha.from_pretrained(tmp_path / "same").figures is None


def test_a_file_of_somebody_else_under_the_figures_name_stays(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text('{"mine": 1}')
    alpha().save_pretrained(tmp_path)
    assert (tmp_path / "figures.json").read_text() == '{"mine": 1}'


def test_a_save_that_fails_leaves_the_earlier_model_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rxt_platform.model.files.save_file", full)  # a full disk can't be had here
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left"):
        alpha(seed=1).save_pretrained(saved)
    assert content(saved) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tensor_of_another_precision_is_named(saved: Path, dtype: torch.dtype) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["decoder.head.bias"] = tensors["decoder.head.bias"].to(dtype)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"decoder\.head\.bias"):
        RxTAlpha.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
def test_a_precision_that_a_model_can_t_have_is_refused(saved: Path, dtype: Any) -> None:
    with pytest.raises(ArtifactError, match=r"dtype .*: one of torch.float32"):
        RxTAlpha.from_pretrained(saved, dtype=dtype)


def test_options_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="safe_serialisation"):
        alpha().save_pretrained(tmp_path / "saved", safe_serialisation=True)


def test_a_tokenizer_file_with_padding_truncation_and_no_decoder_reads_as_ours(saved: Path) -> None:
    path = saved / "tokenizer.json"
    raw = json.loads(path.read_text())
    ours = RxtTokenizer.load(path)
    raw["decoder"] = None
    raw["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    raw["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(raw))
    text = "Tom has a red hat and plays near the lake."
    ids = RxtTokenizer.load(path).encode(text)
    assert ids == ours.encode(text)
    assert RxtTokenizer.load(path).decode(ids) == text
