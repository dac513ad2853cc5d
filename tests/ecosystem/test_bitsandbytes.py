"""Weights in 4 and 8 bits under a compression of tokens: the two do not know of each other."""

import peft
import pytest
import torch
import transformers as T

from tests.ecosystem.cases import CONFIGS, STACK, config, hooks, logits, outputs, same
from tests.tiny import BOS, IMG, LLAVA_SIDE, LLAVA_TOKENS, PATCH, TEXT, inputs

# Kernels for CPUs want input widths in multiples of 64 and output widths in multiples of 32.
WIDE = dict(hidden_size=64, intermediate_size=128)
BITS = {
    "nf4": T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "double": T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4"),
    "int8": T.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),  # rows are rounded one by one
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    tower = T.CLIPVisionConfig(
        **WIDE, num_hidden_layers=4, num_attention_heads=2, image_size=LLAVA_SIDE, patch_size=PATCH, projection_dim=64
    )
    text = T.LlamaConfig(**TEXT | WIDE)
    whole = T.LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=IMG, image_seq_length=LLAVA_TOKENS, pad_token_id=0
    )
    torch.manual_seed(0)
    model = T.LlavaForConditionalGeneration(whole)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)  # at the default scale attention is flat, and a token more or less changes little
    model.generation_config.update(pad_token_id=0, bos_token_id=BOS, eos_token_id=None)
    folder = tmp_path_factory.mktemp("bits")
    model.save_pretrained(folder)
    return folder


def load(path, bits=None, **kwargs):
    kwargs |= {} if bits is None else {"quantization_config": BITS[bits]}
    return T.AutoModelForImageTextToText.from_pretrained(path, **kwargs).eval()


@pytest.mark.parametrize("bits", BITS)
def test_compress_and_decompress(bits, checkpoint):
    model = load(checkpoint, bits)
    batch = inputs("llava", model)
    plain, before = outputs(model, batch), hooks(model)
    found = {}
    for name, wanted in CONFIGS.items():
        model.compress(wanted)
        found[name] = outputs(model, batch)
        model.decompress()
        assert hooks(model) == before
        assert same(outputs(model, batch), plain)
    assert len({out[1].sum().item() for out in (plain, *found.values())}) == 1 + len(found)
    with model.compressed(config(visionzip=0, fastv=0, snapkv=0)):
        assert same(outputs(model, batch), plain)


@torch.no_grad()
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_quantized_model_on_a_prompt_shortened_by_hand(bits, checkpoint):
    model = load(checkpoint, bits)
    batch = {key: value[:1] for key, value in inputs("llava", model).items()}
    batch["pixel_values"] = inputs("llava", model)["pixel_values"][:2]
    with model.compressed("fastervlm", ratio=0.75):
        out = logits(model, batch)[0]
        kept = model.compression.last.visual_kept[0]
    x = model.get_input_embeddings()(batch["input_ids"])
    x[batch["input_ids"] == IMG] = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
    images = (batch["input_ids"][0] == IMG).nonzero()[:, 0].split(LLAVA_TOKENS)
    gone = torch.cat([rows[[i for i in range(LLAVA_TOKENS) if i not in k]] for rows, k in zip(images, kept)])
    stays = torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, gone, False)
    short = model(inputs_embeds=x[:, stays], attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.long)).logits[0]
    assert len(gone) == 2 * 27
    torch.testing.assert_close(out[stays], short, atol=1e-4, rtol=0)
    assert (logits(model, batch)[0, -1] - short[-1]).abs().max() > 0.01


@pytest.mark.parametrize("bits", BITS)
def test_the_report_tells_weights_and_cache_apart(bits, checkpoint):
    full, model = load(checkpoint), load(checkpoint, bits)
    batch, totals = inputs("llava", model), []
    plain = outputs(model, batch)
    for m in (full, model):
        with m.compressed("snapkv", ratio=0.5, window=4):
            logits(m, batch)
            totals.append(m.compression.report().totals())
            lines = str(m.compression.report()).splitlines()
        assert f"weights: {totals[-1]['weight_bytes']:,} bytes as stored" in lines
        assert sum(line.startswith("KV cache") for line in lines) == 1
    assert totals[0]["weight_bytes"] == full.get_memory_footprint()
    assert totals[1]["kv_bytes"] / totals[1]["full_kv_bytes"] == totals[0]["kv_bytes"] / totals[0]["full_kv_bytes"]
    # what is not quantized (embeddings, norms, lm_head) stays; the rest takes 8 or 4 bits and its scales
    linear = [p for p in model.parameters() if p.dtype in (torch.int8, torch.uint8)]
    packed = sum(p.numel() for p in linear)
    values = packed * (1 if bits == "int8" else 2)
    rest = totals[0]["weight_bytes"] - 4 * values
    scales = totals[1]["weight_bytes"] - packed - rest
    most = {"nf4": values / 64 * 4, "double": values / 64 * 1.2, "int8": values / 64 * 4}[bits]
    assert same(outputs(model, batch), plain)  # asking changes nothing
    assert 0 < scales <= most + len(linear) * 2048  # and tables of a fixed size per matrix


@pytest.mark.parametrize("bits", BITS)
def test_save_and_restore(bits, checkpoint, tmp_path):
    model = load(checkpoint, bits, compression_config=STACK)
    batch = inputs("llava", model)
    model.save_pretrained(
        tmp_path
    )  # before the first call: 4-bit weights on CPUs are repacked then, and back with loss
    expected = outputs(model, batch)
    again = load(tmp_path)
    assert again.compression.config == model.compression.config
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert same(outputs(again, batch), expected)


def test_a_step_of_qlora(checkpoint):
    """4-bit weights, adapters and a compression, wrapped before and after it."""
    losses = []
    for first in ("compress", "wrap"):
        model = load(checkpoint, "nf4")
        if first == "compress":
            model.compress(STACK)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(0)
        adapters = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
        model = peft.get_peft_model(model, adapters).train()
        if first == "wrap":
            model.compress(STACK)
        batch = inputs("llava", model)
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] >= 80, -100)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)
