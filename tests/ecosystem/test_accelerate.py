"""accelerate: device maps, offload to the CPU and to disk, Accelerator; in any order with compress and decompress."""

import pytest
import torch
import transformers as T
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

from tests.ecosystem.cases import CONFIGS, STACK, config, hooks, outputs, same
from tests.ecosystem.devices import on, place, pretend
from tests.tiny import build, inputs, single

VISION = ("model.vision_tower", "model.multi_modal_projector")
LAYERS = [f"model.language_model.layers.{i}" for i in range(4)]
REST = ["model.language_model.embed_tokens", "model.language_model.norm", "model.language_model.rotary_emb", "lm_head"]
MAPS = {
    "tower": dict.fromkeys(VISION, "disk") | dict.fromkeys(LAYERS + REST, "cpu"),
    "decoder": dict.fromkeys(VISION, "cpu") | dict.fromkeys(LAYERS + REST, "disk"),
    "middle": dict.fromkeys((*VISION, *LAYERS[:1], *LAYERS[3:], *REST), "cpu") | dict.fromkeys(LAYERS[1:3], "disk"),
}


@pytest.fixture(scope="module")
def expected():
    """Outputs of the bare model and of each compression, without accelerate."""
    model = build("llava")
    batch = inputs("llava", model)
    found = {"none": outputs(model, batch)}
    for name, compression in CONFIGS.items():
        with model.compressed(compression):
            found[name] = outputs(model, batch)
    return batch, found


def dispatch(model, name, folder):
    return dispatch_model(model, MAPS[name], main_device="cpu", offload_dir=folder)


def offloaded(model):
    """How many parameters are not in memory."""
    return sum(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("config", CONFIGS)
def test_compress_after_dispatch(config, name, expected, tmp_path):
    batch, found = expected
    model = dispatch(build("llava"), name, tmp_path)
    assert offloaded(model)
    assert same(outputs(model, batch), found["none"])
    before = hooks(model)
    model.compress(CONFIGS[config])
    assert same(outputs(model, batch), found[config])
    model.decompress()
    assert hooks(model) == before  # accelerate's hooks and its forwards among them
    assert same(outputs(model, batch), found["none"])
    assert offloaded(model)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("config", CONFIGS)
def test_dispatch_after_compress(config, name, expected, tmp_path):
    batch, found = expected
    model = dispatch(build("llava").compress(CONFIGS[config]), name, tmp_path)
    assert offloaded(model)
    assert same(outputs(model, batch), found[config])
    model.decompress()
    assert same(outputs(model, batch), found["none"])
    assert offloaded(model)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.parametrize("first", ["compress", "offload"])
def test_offload_of_the_whole_model(first, offload, expected, tmp_path):
    batch, found = expected
    model = build("llava")
    options = {"offload_dir": tmp_path} if offload is disk_offload else {}
    if first == "compress":
        model.compress(STACK)
    offload(model, execution_device=torch.device("cpu"), **options)
    if first == "offload":
        model.compress(STACK)
    assert offloaded(model) == len(list(model.parameters()))
    assert same(outputs(model, batch), found["stack"])
    model.decompress()
    assert same(outputs(model, batch), found["none"])


def test_accelerate_may_leave_first(expected):
    batch, found = expected
    model = build("llava").compress(STACK)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert same(outputs(model, batch), found["stack"])
    remove_hook_from_submodules(model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert same(outputs(model, batch), found["stack"])
    model.decompress()
    assert same(outputs(model, batch), found["none"])


@pytest.mark.parametrize("memory", [None, 50_000])
def test_device_map_auto(memory, expected, tmp_path):
    """All in memory, and as little as to send most of the weights to disk; compressed in the same line, or later."""
    batch, found = expected
    model = build("llava")
    model.save_pretrained(tmp_path / "plain")
    options = dict(device_map="auto", offload_folder=tmp_path / "offload")
    if memory is not None:
        options["max_memory"] = {"cpu": memory}
    load = T.AutoModelForImageTextToText.from_pretrained
    model = load(tmp_path / "plain", compression_config=STACK, **options).eval()
    assert bool(offloaded(model)) == (memory is not None)
    assert same(outputs(model, batch), found["stack"])
    model.decompress()
    assert same(outputs(model, batch), found["none"])

    model = load(tmp_path / "plain", **options).eval().compress(STACK)
    assert same(outputs(model, batch), found["stack"])
    model.save_pretrained(tmp_path / "stack")
    again = load(tmp_path / "stack", **options).eval()
    assert again.compression.config == model.compression.config
    assert same(outputs(again, batch), found["stack"])


def test_accelerator(expected):
    """prepare() and unwrap_model(), with mixed precision: accelerate replaces the model's forward."""
    batch, found = expected
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)
    losses = []
    for compress_first in (True, False):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = build("llava").train()
        if compress_first:
            model.compress(STACK)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        if not compress_first:
            model.compress(STACK)
        out = model(**batch, labels=labels)
        assert out.logits.dtype == torch.float32
        accelerator.backward(out.loss)
        optimizer.step()
        losses.append(out.loss.item())
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        plain.load_state_dict(build("llava").state_dict())
        assert same(outputs(plain.eval(), batch), found["stack"])
        plain.decompress()
        assert same(outputs(plain, batch), found["none"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def behind(name):
    """Whether a module belongs to the second half of the decoder layers."""
    return "language_model.layers.2" in name or "language_model.layers.3" in name


SPLITS = {
    "one": lambda name: "cuda:0",
    "tower and decoder": lambda name: "cuda:1" if "language_model" in name or "lm_head" in name else "cuda:0",
    "tower elsewhere": lambda name: "cuda:1" if "vision" in name or "projector" in name else "cuda:0",
    "layers": lambda name: "cuda:1" if behind(name) else "cuda:0",
}
# As device_map="auto" fills two devices, in the order of the modules: rotary tables and head come after the layers.
AUTO = lambda name: "cuda:1" if behind(name) or name.endswith(("model.norm", "rotary_emb", "lm_head")) else "cuda:0"
DEEP = {  # what happens at or behind the boundary between the layers
    "pyramiddrop": config(pyramiddrop=0.4),
    "fastv at the boundary": {"methods": [{"method": "fastv", "ratio": 0.3, "knobs": {"layer": 2}}]},
    "fastv behind it": {"methods": [{"method": "fastv", "ratio": 0.2, "knobs": {"layer": 3}}]},
    "snapkv": config(snapkv=0.5),
    "knorm": config(knorm=0.5),
    "streaming": config(streaming=0.5),
    "all stages": config(visionzip=0.3, pyramiddrop=0.3, h2o=0.3),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("config", ["none", *CONFIGS])
def test_tensors_follow_the_device_map(config, split, expected):
    """Tower and decoder on two devices; this machine need not have them."""
    batch, found = expected
    model = place(build("llava"), SPLITS[split])
    if config != "none":
        model.compress(CONFIGS[config])
    with pretend():
        out = outputs(model, {key: on(value.clone(), "cuda:0") for key, value in batch.items()})
    assert out[0].device == torch.device(SPLITS[split]("lm_head"))
    assert same(tuple(t.as_subclass(torch.Tensor) for t in out), found[config])


@pytest.mark.parametrize("where", [SPLITS["layers"], AUTO], ids=["layers", "auto"])
@pytest.mark.parametrize("config", DEEP)
def test_decoder_layers_on_two_devices(config, where, expected):
    """Rows are dropped and entries evicted on both, of a padded batch and of a row alone."""
    plain, model = build("llava").compress(DEEP[config]), place(build("llava"), where).compress(DEEP[config])
    for batch in (expected[0], single(expected[0], 0, "llava")):
        want = *turns(plain, batch)[0], *outputs(plain, batch)
        with pretend():
            here = {key: on(value.clone(), "cuda:0") for key, value in batch.items()}
            found, cache = turns(model, here)
            got = *found, *outputs(model, here)
        assert [layer.keys.device.index for layer in cache.layers] == [0, 0, 1, 1]
        assert [layer.layout.device.index for layer in cache.layers] == [0, 0, 1, 1]
        assert same(tuple(t.as_subclass(torch.Tensor) for t in got), want)
        a, b = model.compression.last, plain.compression.last
        assert (a.layer_index, a.visual_kept, a.cache_tokens) == (b.layer_index, b.visual_kept, b.cache_tokens)


def test_decoder_layers_of_one_device_share_their_book(expected):
    """One copy per device, not per layer: masks derive from it."""
    model = place(build("llava"), AUTO).compress(CONFIGS["layers"])
    with pretend():
        _, cache = turns(model, {key: on(value.clone(), "cuda:0") for key, value in expected[0].items()})
        layouts = [layer.layout for layer in cache.layers]
    assert layouts[2] is layouts[3]
    assert layouts[1].device != layouts[2].device
    assert torch.equal(*(x.index.as_subclass(torch.Tensor) for x in layouts[1:3]))


@torch.no_grad()
def turns(model, batch):
    """Logits of a step and of three rows at once after a prompt whose cache was reordered, and that cache."""
    cache, ids = model(**batch).past_key_values, batch["input_ids"]
    cache.reorder_cache(torch.arange(len(ids), device=ids.device).flip(0))
    found, mask = [], batch["attention_mask"].flip(0)
    for new in (ids[:, :1] * 0 + 7, ids[:, :3] * 0 + 9):
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        found.append(model(input_ids=new, attention_mask=mask, past_key_values=cache).logits)
    return found, cache


def test_the_pretended_devices_notice_a_mistake():
    a, b = (on(torch.ones(3), device) for device in ("cuda:0", "cuda:1"))
    with pretend():
        assert (a + b.to(a.device)).device == torch.device("cuda:0")
        for wrong in (lambda: a + b, lambda: torch.cat([a, b]), lambda: a[b.long()], lambda: a + torch.ones(3)):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
