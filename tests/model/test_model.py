"""The model path: weights come from files as transformers would load them, and whatever saves memory leaves the numbers."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import gradients, models
from helpers import training as runs
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastft.common.distributed import join_ranks
from fastft.errors import UserError
from fastft.model import weights
from fastft.model.activation_checkpointing import recompute
from fastft.model.build import build_model
from fastft.model.pretrained import load_config


@pytest.fixture
def model_copy(ground, tmp_path):
    """A copy of the model, to be damaged."""
    return shutil.copytree(ground / "model", tmp_path / "model")


@pytest.fixture(autouse=True)
def _heard(caplog):
    """Everything that fastft says is in caplog.messages."""
    caplog.set_level(logging.INFO, "fastft")


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers as the trainer loads them, in one process."""
    join_ranks()
    causal_lm = build_model(load_config(str(path)), "eager", str(path))
    read = weights.open_weights(str(path), causal_lm)
    weights.fill_buffers(causal_lm, read)
    weights.fill(causal_lm, read, torch.device("cpu"), lambda parameter: torch.float32)
    return tensors(causal_lm)


def tensors(causal_lm) -> dict[str, torch.Tensor]:
    return {**dict(causal_lm.named_parameters(remove_duplicate=False)), **dict(causal_lm.named_buffers())}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Names, types, bits, and which names share one tensor."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        for other, same in theirs.items():
            assert (ours[name] is ours[other]) == (tensor is same), (name, other)


def from_pretrained(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# Loading -----------------------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("family", [*models.FAMILIES, "gpt2", "mixtral", "gpt_neox"])
def test_every_parameter_and_buffer_is_the_one_that_transformers_loads(family, tmp_path, caplog):
    """Bit for bit; above all the buffers that no file holds, which are garbage after an initialisation on meta."""
    options = {"mixtral": {"num_local_experts": 3}, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}
    path = models.make_model(tmp_path / "model", family, **options.get(family, {}))
    assert_same(loaded(path), tensors(from_pretrained(path)))
    renamed = family in ("mixtral", "gpt_neox")  # experts in one tensor, a head under another name
    assert ("first process" in "".join(caplog.messages)) == renamed


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_frequencies_are_those_of_transformers(kind, tmp_path):
    rope = {"rope_theta": 5e5, **ROPES[kind]}
    path = models.make_model(tmp_path / "model", rope_parameters=rope)
    ours = loaded(path)
    assert ours["model.rotary_emb.inv_freq"].isfinite().all()
    assert_same(ours, tensors(from_pretrained(path)))


def test_a_buffer_that_transformers_would_not_compute_is_refused(ground):
    causal_lm = build_model(load_config(str(ground / "model")), "eager", "llama")
    causal_lm.model.register_buffer("forgotten", torch.ones(3), persistent=False)
    with pytest.raises(UserError, match=r"does not compute its buffer model\.forgotten"):
        weights.compute_buffers(causal_lm)


def test_bf16_files_in_several_parts_become_fp32_masters(tmp_path, caplog):
    path = models.make_model(tmp_path / "model", dtype="bfloat16")
    from_pretrained(path).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    (path / "model.safetensors").unlink()
    assert len(list(path.glob("model-*.safetensors"))) > 3
    ours = loaded(path)
    assert ours["lm_head.weight"].dtype == torch.float32 and not caplog.messages
    assert_same(ours, tensors(from_pretrained(path)))


def test_tied_weights_are_found_under_either_name(tmp_path):
    path = models.make_model(tmp_path / "model", "llama_tied")
    expected = tensors(from_pretrained(path))
    state = load_file(path / "model.safetensors")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        embedding = state.pop("model.embed_tokens.weight", state.get("lm_head.weight"))
        state.update({name: embedding.clone() for name in names})
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        ours = loaded(path)
        assert_same(ours, expected)
    state["lm_head.weight"] += 1
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"safetensors: .* differs from .*ties it"):
        loaded(path)
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"differs from .*ties it"):
        loaded(path)


def test_files_of_the_bare_model_or_without_safetensors_are_loaded_by_transformers(tmp_path, caplog):
    path = models.make_model(tmp_path / "model", "llama_tied")
    expected = tensors(from_pretrained(path))
    state = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, path / "model.safetensors")
    assert_same(loaded(path), expected)
    assert "names or shapes are not those" in caplog.messages[0]
    caplog.clear()
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    assert_same(loaded(path), expected)
    assert "not in safetensors files; the first process loads the whole model" in caplog.messages[0]


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_of_a_stranger_is_not_run(ground, model_copy, monkeypatch):
    monkeypatch.chdir(model_copy)
    (model_copy / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, model_copy / "pytorch_model.bin", pickle_module=pickle)
    runs.fails(
        runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), "the model cannot be loaded"
    )
    assert not (model_copy / "exploded").exists()


def change(path: Path, change) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, share: float) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: change(p, lambda s: s.pop(DOWN)), f"model.safetensors: the weight {DOWN} is missing"),
        (lambda p: change(p, lambda s: s.update({DOWN: s[DOWN][:5]})), f"{DOWN} has shape [5, 64], by the config it is [32"),
        (lambda p: cut(p, 0.5), "model.safetensors: is cut short: "),
        (lambda p: cut(p, 0.001), "model.safetensors: is cut short or no safetensors file"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors: is cut short or no safetensors file"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{]"), "header is not safetensors'"),
        (lambda p: (p / "model.safetensors").unlink(), "the model cannot be loaded"),
        (lambda p: (p / "model.safetensors").rename(p / "model.safetensors.index.json"), "index.json: is damaged"),
    ],
)  # fmt: skip
def test_files_that_are_damaged_are_one_clear_line(ground, model_copy, damage, says):
    damage(model_copy)
    runs.fails(runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), says)


def test_a_missing_part_is_named_with_what_it_holds(ground, model_copy):
    (model_copy / "model.safetensors").rename(model_copy / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(
        load_file(model_copy / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"
    )
    index = {"weight_map": {**names, "lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    says = "model-00002-of-00002.safetensors: is missing; the model's index says that it holds lm_head.weight"
    runs.fails(runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), says)


def test_tensors_without_a_place_are_told_of(model_copy, caplog):
    change(
        model_copy,
        lambda s: s.update({"mtp.head": torch.zeros(2), "model.layers.0.rotary_emb.inv_freq": torch.ones(4)}),
    )
    loaded(model_copy)
    (said,) = caplog.messages
    assert "model.safetensors: mtp.head has no place in the model (1 such tensors)" in said


def test_an_adapter_is_no_model(ground, model_copy):
    (model_copy / "adapter_config.json").write_text("{}")
    runs.fails(runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), "holds an adapter")


@pytest.mark.parametrize("family", ["bert", "t5", "vit", "bart"])
def test_what_is_no_causal_language_model_is_one_clear_line(ground, model_copy, family):
    """And not that it lacks embeddings, which would be the next thing to be said of this one."""
    config = {"model_type": family, "vocab_size": 100}
    (model_copy / "config.json").write_text(json.dumps(config))
    says = f"{family} is no causal language model"
    runs.fails(runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), says)


def test_quantized_weights_are_refused(ground, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model_copy / "config.json").write_text(json.dumps(config))
    runs.fails(
        runs.train_here(ground, model_copy.parent / "out", "--model", str(model_copy)), "its weights are quantized"
    )


# Sharding ----------------------------------------------------------------------------------------------------------------


def ranks(processes: int, out: Path, flags: list[str]) -> dict[str, torch.Tensor]:
    """Gradients of the first step on some processes."""
    target = [str(runs.HERE / "gradients.py"), str(out), *flags]
    done = runs.run(runs.command(processes, target))
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def test_two_replicas_of_two_shards_are_one_process(ground, tmp_path):
    """HSDP: summed within a replica and over the replicas, divided by nothing; one tensor for both ends of the model."""
    models.make_model(tmp_path / "model", "llama_tied")
    (tmp_path / "data.jsonl").symlink_to(ground / "data.jsonl")
    one = gradients.first_gradients(runs.flags(tmp_path, tmp_path))
    runs.assert_gradients_agree(one, ranks(4, tmp_path / "4.pt", runs.flags(tmp_path, tmp_path, "--replicas", "2")))


def test_weights_sent_by_the_first_process_and_grown_are_sharded_as_on_one(ground, tmp_path):
    """One expert on two processes: the second holds no row of the router and of the expert."""
    options = {"num_local_experts": 1, "num_experts_per_tok": 1, "vocab_size": 500}
    models.make_model(tmp_path / "model", "mixtral", **options)
    (tmp_path / "data.jsonl").symlink_to(ground / "data.jsonl")
    flags = runs.flags(tmp_path, tmp_path / "out", "--resize_embeddings", "true")
    one, two = gradients.first_gradients(flags), ranks(2, tmp_path / "2.pt", flags)
    for values in (one, two):  # a choice of one out of one has no gradient
        for name in [name for name in values if name.endswith("mlp.gate.weight")]:
            assert not values.pop(name).any()
    runs.assert_gradients_agree(one, two)


def test_replicas_that_do_not_divide_the_processes_are_refused(ground, tmp_path):
    runs.fails(
        runs.train_here(ground, tmp_path / "out", "--replicas", "2"), "replicas 2 does not divide the 1 processes"
    )


def test_offloading_leaves_gradients_as_they_are(ground, tmp_path):
    plain = gradients.first_gradients(runs.flags(ground, tmp_path))
    offloaded = gradients.first_gradients(runs.flags(ground, tmp_path, "--offload", "true"))
    for name in plain:
        assert torch.equal(plain[name], offloaded[name]), name
    done = runs.train_here(ground, tmp_path / "out", "--offload", "true", "--max_steps", "2")
    assert done.returncode == 0, done.stderr


# Computing again ---------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def test_each_mode_computes_again_what_it_says():
    """A block with four matrix products: 4 forward, 8 backward, and 4, 2 or 0 again; attention only in mode full."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=i % 2 == 1) for i in range(4))

        def forward(self, x):
            for linear in self.linears:
                x = linear(x).tanh()
            return torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])

    matmuls, attentions = {}, {}
    for mode in ("none", "selective", "full"):
        block = Block()
        recompute(block, mode)
        with Counting() as counting:
            block(torch.ones(4, 8, requires_grad=True)).sum().backward()
        matmuls[mode] = counting.counts["aten::mm"] + counting.counts["aten::addmm"]
        attentions[mode] = counting.counts["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert matmuls == {"none": 12, "selective": 14, "full": 16}
    assert attentions == {"none": 1, "selective": 1, "full": 2}


def _dense(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The documents backend without a loop over them: torch.compile takes it into the block's graph."""
    places = torch.arange(query.shape[2])
    document = torch.bucketize(places, kwargs["cu_seqlens"].long(), right=True)
    visible = (document[:, None] == document[None]) & (places[:, None] >= places[None])
    options = {"attn_mask": visible, "scale": scaling, "enable_gqa": True}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """One layer: compiling is what takes the time."""
    path = tmp_path_factory.mktemp("shallow")
    models.make_model(path / "model", num_hidden_layers=1)
    models.make_data(path / "data.jsonl")
    return path, gradients.first_gradients(runs.flags(path, path / "out", "--gradient_checkpointing", "none"))


@pytest.mark.parametrize(
    ("mode", "compiler"),
    [
        ("selective", None),
        ("full", None),
        ("none", "aot_eager_decomp_partition"),
        ("selective", "inductor"),
        ("full", "aot_eager_decomp_partition"),
    ],
)
def test_gradients_do_not_depend_on_what_is_computed_again_or_compiled(shallow, tmp_path, monkeypatch, mode, compiler):
    """Compiled, the checkpoint is a part of the block's graph: nothing breaks it. (Two of the three without code generation:
    what is computed again has been decided by then, and it takes ten seconds.)
    """
    import torch._dynamo
    from transformers import AttentionInterface

    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compile_block(block, backend=compiler, **how))
    AttentionInterface.register("test_dense", _dense)
    monkeypatch.setattr(gradients, "choose_attention", lambda *_: ("test_dense", ""))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    path, plain = shallow
    flags = runs.flags(path, tmp_path, "--gradient_checkpointing", mode, "--compile", "true" if compiler else "false")
    runs.assert_gradients_agree(plain, gradients.first_gradients(flags))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == bool(compiler) and not counters["graph_break"]


def test_a_compiled_run_has_one_graph_for_training_and_its_shapes_are_numbers(shallow, tmp_path, monkeypatch):
    """The proof of isolation and the samples before the first step are shorter: compiled, they would make the sizes of all
    that comes after symbols, for which slower code is made, and be graphs of their own.
    """
    import torch._dynamo
    from transformers import AttentionInterface

    graphs, compile_block = [], torch.nn.Module.compile

    def noting(graph, inputs):
        inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = [n for value in inputs for n in (value.shape if isinstance(value, torch.Tensor) else [value])]
        graphs.append((torch.is_grad_enabled(), {type(size) for size in sizes}))
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compile_block(block, backend=noting, **how))
    AttentionInterface.register("test_dense", _dense)
    monkeypatch.setattr("fastft.train.loop.choose_attention", lambda *_: ("test_dense", ""))
    torch._dynamo.reset()
    path, _ = shallow
    (tmp_path / "prompts.txt").write_text("hello\n")
    flags = ["--samples.prompts", str(tmp_path / "prompts.txt"), "--samples.max_new_tokens", "2", "--compile", "true"]
    more = ["--eval_data", str(path / "data.jsonl"), "--max_steps", "3", "--gradient_checkpointing", "none"]
    done = runs.train_here(path, tmp_path / "out", *flags, *more)
    assert done.returncode == 0, done.stderr
    assert graphs == [(True, {int}), (False, {int})]  # training, held-out loss


# Longer rows, more tokens ----------------------------------------------------------------------------------------------


def one_step(ground: Path, out: Path, *flags: str) -> None:
    done = runs.train_here(ground, out, "--max_steps", "1", *flags)
    assert done.returncode == 0, done.stderr


def assert_exported_as_trained(ground: Path, out: Path, *flags: str) -> None:
    """The exported model, loaded by transformers, gives the logits of the trainer's own forward pass over a whole row."""
    from fastft.config import parse_config
    from fastft.data.template.chat_template import load_template
    from fastft.model import loss
    from fastft.model.attention import choose_attention
    from fastft.model.build import prepare_model
    from fastft.model.pretrained import fit_config
    from fastft.train.checkpoint import local as checkpoint
    from fastft.train.loop import build_optimizer

    config, device = parse_config(runs.flags(ground, out, "--max_steps", "1", *flags)), join_ranks()
    template = load_template(config.model, config.template)
    model_config = fit_config(load_config(config.model), config, len(template.tokenizer))
    attention, _ = choose_attention("documents", device)
    model = prepare_model(config, model_config, attention, device)
    checkpoint.load(checkpoint.newest(out / "checkpoints")[0], model, build_optimizer(model, config))
    length, logits = config.seq_len, []
    forward = loss.summed_cross_entropy

    def watched(hidden_TD, targets_T, head, *more):
        logits.append(head(hidden_TD))
        return forward(hidden_TD, targets_T, head, *more)

    words = torch.randint(len(template.tokenizer), (1, length), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length)
    with torch.no_grad(), patch("fastft.model.build.summed_cross_entropy", watched):
        model.eval()(words, places[None], torch.tensor([0, length], dtype=torch.int32), length, places, words[0])
        expected = from_pretrained(out / "model").eval()(words).logits[0]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def short(ground, tmp_path_factory):
    """A model that knows 64 positions; the runs below ask for 160."""
    path = tmp_path_factory.mktemp("short")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    models.make_model(path / "model", max_position_embeddings=64, rope_parameters=rope)
    (path / "data.jsonl").symlink_to(ground / "data.jsonl")
    return path


def test_rows_longer_than_the_models_positions_name_the_option(short, tmp_path):
    says = "seq_len 160 is longer than the 64 positions", "--extend yarn or --extend linear"
    runs.fails(runs.train_here(short, tmp_path / "out"), *says)


@pytest.mark.parametrize("extend", ["linear", "yarn"])
def test_longer_rows_are_trained_and_exported(short, tmp_path, extend):
    from transformers import AutoConfig

    one_step(short, tmp_path / "out", "--extend", extend)
    config = AutoConfig.from_pretrained(tmp_path / "out" / "model")
    assert config.max_position_embeddings == 160
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (extend, 2.5, 5e5)
    assert extend == "linear" or rope["original_max_position_embeddings"] == 64
    plain = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    scaled = from_pretrained(tmp_path / "out" / "model").model.rotary_emb.inv_freq
    assert scaled[-1] == pytest.approx(float(plain[-1]) / 2.5)
    assert scaled[0] == pytest.approx(float(plain[0]) / (2.5 if extend == "linear" else 1), rel=1e-6)
    assert_exported_as_trained(short, tmp_path / "out", "--extend", extend)


def test_rows_that_fit_need_no_scaling(short, tmp_path):
    one_step(short, tmp_path / "out", "--extend", "yarn", "--seq_len", "64", "--overlong", "drop")
    assert load_config(str(tmp_path / "out" / "model")).rope_parameters["rope_type"] == "default"


def test_scaling_goes_on_top_of_linear_only(short):
    from fastft.model.rope_scaling import fit_seq_len

    def fitted(extend, seq_len=160, **rope):
        config = load_config(str(short / "model"))
        config.rope_parameters.update(rope)
        return fit_seq_len(config, seq_len, extend, "m").rope_parameters

    assert fitted("linear", rope_type="linear", factor=4.0)["factor"] == 10
    assert fitted("yarn", seq_len=64) == fitted("none", seq_len=64)
    for extend, rope in (("yarn", {"rope_type": "linear", "factor": 4.0}), ("linear", LLAMA3)):
        with pytest.raises(UserError, match=f"{rope['rope_type']} scales them already: {extend} cannot"):
            fitted(extend, **rope)


def test_only_layers_that_see_the_whole_row_are_scaled(tmp_path):
    from fastft.model.rope_scaling import fit_seq_len

    path = models.make_model(tmp_path / "model", "gemma3_text")
    rope = fit_seq_len(load_config(str(path)), 2048, "linear", "m").rope_parameters
    assert rope["full_attention"]["factor"] == 4 and rope["sliding_attention"]["rope_type"] == "default"


def test_positions_that_cannot_be_scaled_are_refused(ground, tmp_path):
    models.make_model(tmp_path / "model", "gpt2", n_embd=32, n_layer=2, n_head=4, max_position_embeddings=64)
    (tmp_path / "data.jsonl").symlink_to(ground / "data.jsonl")
    runs.fails(runs.train_here(tmp_path, tmp_path / "out", "--extend", "yarn"), "they are not rotary")


def test_positions_chosen_by_the_longest_conversation_of_a_row_are_refused(ground, tmp_path):
    """Phi-3's longrope has one set of frequencies for short texts and one for long ones; a packed row would mix them."""
    path = models.make_model(tmp_path / "model", "phi3", rope_parameters={"rope_theta": 1e4, **ROPES["longrope"]})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "original_max_position_embeddings": 128}))
    (tmp_path / "data.jsonl").symlink_to(ground / "data.jsonl")
    runs.fails(runs.train_here(tmp_path, tmp_path / "out"), "longrope", "exact up to 128 tokens")
    one_step(tmp_path, tmp_path / "out", "--seq_len", "128", "--overlong", "drop")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi"])
def test_new_tokens_get_the_mean_embedding(ground, tmp_path, family):
    """A tokenizer with 557 tokens over 500 rows; phi's head has a bias."""
    model = models.make_model(tmp_path / "model", family, vocab_size=500)
    (tmp_path / "data.jsonl").symlink_to(ground / "data.jsonl")
    says = "knows 556 tokens, the model has embeddings for 500; --resize_embeddings true"
    runs.fails(runs.train_here(tmp_path, tmp_path / "out"), says)

    grow = ("--resize_embeddings", "true", "--optimizer.lr", "1e-30")  # as good as not trained
    one_step(tmp_path, tmp_path / "out", *grow)
    assert_exported_as_trained(tmp_path, tmp_path / "out", *grow)
    old, new = from_pretrained(model), from_pretrained(tmp_path / "out" / "model")
    assert new.config.vocab_size == 576
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == (family == "llama_tied")
    for name in ("model.embed_tokens.weight", "lm_head.weight", *(["lm_head.bias"] if family == "phi" else [])):
        before, after = old.get_parameter(name), new.get_parameter(name)
        assert torch.equal(after[:500], before)
        torch.testing.assert_close(after[500:], before.mean(0, keepdim=True).expand_as(after[500:]))
