"""Attention by blocks equals dense attention under the same mask, and fused LoRA layers equal peft's."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from llmrec.adapter import fresh_adapter
from llmrec.errors import ModelError
from llmrec.lora import FusedLinear, fused, merge
from llmrec.score.attention import BLOCK, NAME, Blocks, mask_of
from llmrec.score.config import ItemTokensConfig
from llmrec.score.loading import load_body, load_causal, shared_body
from llmrec.score.packed import forward, row_of
from llmrec.score.trie import Tree
from llmrec.testing import tiny_lm


def packed_sees(rows, past, new, branches, branch, rng):
    """What queries see behind a past of random length: a causal beginning, then branches apart."""
    n = new + branches * branch
    sees = np.zeros((rows, n, past + n), np.bool_)
    for row in range(rows):
        sees[row, :, : rng.integers(0, past + 1)] = True
        sees[row, :new, past : past + new] = np.tri(new, dtype=bool)
        sees[row, new:, past : past + new] = True
        for at in range(new, n, branch):
            sees[row, at : at + branch, past + at : past + at + branch] = np.tri(branch, dtype=bool)
    return sees


def tensors(rows, heads, shared, n, m, seed, dtype=torch.float32, dim=8):
    torch.manual_seed(seed)
    q = torch.randn(rows, heads * shared, n, dim)
    k, v = torch.randn(2, rows, heads, m, dim)
    return [x.to(dtype).requires_grad_(dtype == torch.float32) for x in (q, k, v)]


def dense(q, k, v, sees, scale=None):
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    found = scaled_dot_product_attention(q, k, v, torch.from_numpy(sees)[:, None], scale=scale)
    return found.transpose(1, 2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    past=st.integers(0, 90),
    new=st.integers(1, 150),
    branches=st.integers(4, 20),
    branch=st.integers(9, 40),
    shared=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_blocks_equal_dense_attention_and_its_gradients(rows, past, new, branches, branch, shared, seed):
    sees = packed_sees(rows, past, new, branches, branch, np.random.default_rng(seed))
    blocks = Blocks.of(sees, torch.float32)
    if blocks is None:
        return
    given_ = tensors(rows, 2, shared, sees.shape[1], sees.shape[2], seed)
    found, expected = blocks.attend(*given_, 0.3), dense(*given_, sees, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(found)
    own = torch.autograd.grad((found * weights).sum(), given_)
    plain = torch.autograd.grad((expected * weights).sum(), given_)
    for one, other in zip(own, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_products_in_bfloat16_are_as_near_as_bfloat16_is():
    sees = packed_sees(2, 50, 90, 12, 20, np.random.default_rng(0))
    q, k, v = tensors(2, 2, 3, sees.shape[1], sees.shape[2], 0, dim=64)
    # Large products: what is rounded before the softmax would show.
    low = [x.detach().bfloat16() for x in (3 * q, 3 * k, v)]
    with torch.no_grad():
        truth = dense(*(x.float() for x in low), sees)
        apart = (Blocks.of(sees, torch.bfloat16).attend(*low, None).float() - truth).abs()
        kernel = (dense(*low, sees).float() - truth).abs()
    assert 0 < apart.mean() < 1.5 * kernel.mean() and apart.max() < 2 * kernel.max()


def test_fewer_pairs_are_multiplied_and_only_where_that_pays():
    sees = packed_sees(1, 0, 200, 40, 15, np.random.default_rng(0))
    blocks = Blocks.of(sees, torch.float32)
    multiplied = sum(group.mask.numel() for group in blocks.groups)
    assert sees.sum() <= multiplied < 0.5 * sees.size
    assert Blocks.of(np.ones((2, 3 * BLOCK, 3 * BLOCK), np.bool_), torch.float32) is None


@pytest.mark.parametrize("make", ["llama", "gpt2", "qwen"])
def test_a_packed_forward_is_the_same_with_blocks_and_without(make, tmp_path, monkeypatch):
    body, _ = load_causal(tiny_lm(tmp_path, make=make, seed=1), None, torch.float32)
    assert body.config._attn_implementation == NAME
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(5, 90, n).tolist() for n in (70, 130)]
    trees = [Tree.of([rng.integers(5, 90, 12).tolist() for _ in range(15)])[0] for _ in beginnings]
    rows = [row_of(b, tree) for b, tree in zip(beginnings, trees, strict=True)]
    masks = []

    def noted(sees, like):
        masks.append(mask_of(sees, like))
        return masks[-1]

    def plain(sees, like):
        return mask_of(sees, like).clone()

    with torch.no_grad():
        monkeypatch.setattr("llmrec.score.packed.mask_of", noted)
        found, kept = forward(body.eval(), rows)
        monkeypatch.setattr("llmrec.score.packed.mask_of", plain)
        expected, dense_kept = forward(body, rows)
    assert masks[0].blocks is not None and not hasattr(masks[0].clone(), "blocks")
    for i, row in enumerate(rows):
        n = len(row.tokens)
        torch.testing.assert_close(found[i, :n], expected[i, :n], atol=1e-4, rtol=1e-4)
        for (key, value), (other_key, other_value) in zip(kept, dense_kept, strict=True):
            torch.testing.assert_close(key[i, :, :n], other_key[i, :, :n], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(value[i, :, :n], other_value[i, :, :n], atol=1e-4, rtol=1e-4)


def adapted(make, folder):
    """The same LoRA model with fused layers, and as peft makes it."""
    body = load_body(tiny_lm(folder, make=make, seed=1), None, torch.float32)
    plain = get_peft_model(body, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made = fused(copy.deepcopy(plain))
    kinds = {type(module) for module in made.modules()}
    assert FusedLinear in kinds and Linear not in kinds
    return made, plain


def gradients(model, states):
    # Not their squares: after the last normalisation these hardly change.
    wanted = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * wanted).mean().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in found)
    return found


TOKENS = torch.arange(5, 30)[None]


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_fused_layers_equal_those_of_peft(make, tmp_path):
    # In float64: another order of sums is rounded otherwise, by more than the gradients allow in float32.
    made, plain = (model.double() for model in adapted(make, tmp_path))
    states, expected = (model(input_ids=TOKENS).last_hidden_state for model in (made, plain))
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-5)
    for own, other in zip(gradients(made, states), gradients(plain, expected), strict=True):
        torch.testing.assert_close(own, other, atol=1e-7, rtol=1e-4)
    with made.disable_adapter(), plain.disable_adapter():
        alone = made(TOKENS).last_hidden_state
        torch.testing.assert_close(alone, plain(TOKENS).last_hidden_state)
    assert (alone - states).abs().max() > 0.01
    made.save_pretrained(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_fused_layers_learn_as_those_of_peft_in_bfloat16_with_checkpointing(make, tmp_path):
    made, plain = adapted(make, tmp_path)
    made.gradient_checkpointing_enable()
    for module in [*made.train().modules(), *plain.train().modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    learned = {}
    for name, model, low in (("exact", plain, False), ("peft", plain, True), ("fused", made, True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            states = model(input_ids=TOKENS).last_hidden_state.float()
        grads = torch.cat([gradient.clone().flatten() for gradient in gradients(model, states)])
        learned[name] = states.detach().flatten(), grads
    for own, other, exact in zip(learned["fused"], learned["peft"], learned["exact"], strict=True):
        # About as near to float32 as peft's own layers are; which is nearer is chance.
        assert 0 < (own - exact).norm() < 3 * (other - exact).norm() < 0.4 * exact.norm()


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_a_merged_model_scores_and_saves_the_same_and_leaves_shared_weights_alone(make, tmp_path):
    plain = tiny_lm(tmp_path / "base", make=make, seed=1)
    own, other = shared_body(plain, None, torch.float32), shared_body(plain, None, torch.float32)
    before = other(input_ids=TOKENS).last_hidden_state
    made = fresh_adapter(own, ItemTokensConfig(rank=4))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = made(input_ids=TOKENS).last_hidden_state
    made.save_pretrained(str(tmp_path / "apart"))
    layers = [module for module in made.modules() if isinstance(module, FusedLinear)]
    products = []
    for module in layers:
        for part in (module.base_layer, *module.lora_A.values(), *module.lora_B.values()):
            part.register_forward_hook(lambda *_: products.append(1))
    merge(made)
    merge(made)  # does not add it again
    found = made(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - before).abs().max() > 0.01 and len(products) == len(layers)
    torch.testing.assert_close(other(input_ids=TOKENS).last_hidden_state, before, atol=0, rtol=0)
    made.save_pretrained(str(tmp_path / "merged"))
    kept, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("apart", "merged"))
    assert kept.keys() == merged.keys() and all(torch.equal(kept[name], merged[name]) for name in kept)


def test_a_model_that_carries_a_state_along_is_refused(tmp_path):
    from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

    plain = tiny_lm(tmp_path / "plain", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    shape = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    folder = tmp_path / "mamba"
    MambaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for load in (load_body, load_causal):
        with pytest.raises(ModelError, match="cannot read several candidates"):
            load(folder, None, torch.float32)
