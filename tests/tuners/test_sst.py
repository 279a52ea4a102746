"""SST's own invariants: its gradients, its schedule, and what a swap and a new SVD leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectral_peft import SST, Size, SpectralError, SSTConfig
from spectral_peft.enhanced_gradient import dense_is_cheaper
from spectral_peft.linalg import orthonormality_error
from tests.models import batch, layers, llama, logits, train_, trainable, updates
from tests.tolerance import tolerance


def sst(weight: Tensor, r: int = 4, **fields: object) -> SST:
    """SST on one weight, and never a swap unless `fields` say so."""
    config = SSTConfig(r=r, svd="exact", **{"steps_per_iteration": 1000, "warmup_steps": 0, **fields})
    update = config.build(Size(*weight.shape, r, weight.dtype, key="layer"))
    update.start_(config.decompose(weight, r))
    update.freeze_start_()
    return update


def step(update: SST, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One optimizer step on a loss whose gradient is not symmetric in anything."""
    (update(x) ** 2 * torch.arange(1, update.U.weight.shape[0] + 1)).mean().backward()
    update.before_optimizer_step()
    optimizer.step()
    for parameter in update.after_optimizer_step():
        optimizer.state.pop(parameter, None)
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize("gradient", ["enhanced", "default"])
@pytest.mark.parametrize("rows", [7, 150])  # by segments, and by way of W
def test_gradients_are_projections_of_the_dense_gradient(shape: tuple[int, int], gradient: str, rows: int) -> None:
    assert dense_is_cheaper(rows, *shape, min(shape), 4) == (rows == 150)
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, rows, shape[1], dtype=torch.float64, requires_grad=True)[0]
    x.retain_grad()
    update, g = sst(W.detach(), gradient=gradient), torch.randn(rows, shape[0], dtype=torch.float64)
    (x @ W.T).backward(g)
    G, dx = W.grad, x.grad.clone()
    x.grad = None
    update(x).backward(g)
    U, S, Vh = update.factors()
    r, S = update.r, S.detach()
    scale = torch.ones(r, dtype=torch.float64) if gradient == "enhanced" else S[:r]
    torch.testing.assert_close(update.U.weight.grad, G @ Vh[:r].T * scale)
    torch.testing.assert_close(update.Vh.weight.grad, (G.T @ U[:, :r] * scale).T)
    torch.testing.assert_close(update.dS.weight.grad, torch.diag(U.T @ G @ Vh.T))
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize("rows", [3, 90])
def test_no_gradient_is_computed_that_nobody_asked_for(rows: int) -> None:
    update, x = sst(torch.randn(8, 8)), torch.randn(rows, 8)
    update.U.weight.requires_grad_(False)
    update(x).sum().backward()
    assert update.U.weight.grad is None
    assert update.Vh.weight.grad is not None
    assert x.grad is None


@pytest.mark.parametrize("rows", [8, 400])  # by segments, and by way of W
def test_autocast_checkpointing_and_compilation_keep_the_gradients(rows: int) -> None:
    update, x = sst(torch.randn(32, 16)), torch.randn(rows, 16, requires_grad=True)

    def gradients(call: Callable[[Tensor], Tensor], autocast: bool = False) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        held = [x, *(value for _, value in update.trained_parameters())]
        return torch.autograd.grad(y.float().square().sum(), held)

    expected = gradients(update)
    checkpointed = gradients(lambda value: checkpoint(update, value, use_reentrant=False))
    compiled = gradients(torch.compile(update, backend="aot_eager", fullgraph=True))
    rounded = gradients(update, autocast=True)
    for one, two, three, four in zip(expected, checkpointed, compiled, rounded, strict=True):
        torch.testing.assert_close(two, one)
        torch.testing.assert_close(three, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
        assert (four - one).norm() < 0.05 * one.norm()


def test_many_rows_save_their_input_alone() -> None:
    """No activations in the basis of the triplets: with them a layer would keep twice as much."""
    update, x, saved = sst(torch.randn(16, 16)), torch.randn(200, 16, requires_grad=True), []
    own = {value.data_ptr() for value in update.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        update(x)
    assert sum(t.numel() for t in saved if t.data_ptr() not in own and t.numel() > 16) == x.numel()


def test_values_are_clamped_and_vectors_normalized_after_a_step() -> None:
    update = sst(torch.randn(12, 10))
    optimizer = torch.optim.AdamW([value for value in update.parameters() if value.requires_grad], lr=0.5)
    for _ in range(20):
        step(update, optimizer, torch.randn(5, 10))
    assert (update.singular_values() >= 0).all()
    assert (update.singular_values() == 0).any()
    torch.testing.assert_close(update.U.weight.norm(dim=0), torch.ones(4))
    torch.testing.assert_close(update.Vh.weight.norm(dim=1), torch.ones(4))


def test_frozen_vectors_stay_bit_by_bit_within_an_iteration() -> None:
    update = sst(torch.randn(12, 10), steps_per_iteration=4)
    optimizer = torch.optim.AdamW([value for value in update.parameters() if value.requires_grad], lr=0.1)
    for expected_change in (False, False, False, True):
        before = copy.deepcopy(update.state_dict())
        step(update, optimizer, torch.randn(5, 10))
        for name in ("U_rest.weight", "Vh_rest.weight", "order"):
            assert torch.equal(update.state_dict()[name], before[name]) is not expected_change


def test_a_swap_exchanges_triplets_and_keeps_the_weight() -> None:
    update = sst(torch.randn(12, 10, dtype=torch.float64))
    update.dS.weight.data.uniform_()
    before, order = update.matrix(), update.order.clone()
    triplets = {int(i): update.factors().U[:, slot].clone() for slot, i in enumerate(update.order)}
    update._swap(torch.tensor([9, 1, 7, 3]))
    assert sorted(update.order[:4].tolist()) == [1, 3, 7, 9]
    assert sorted(update.order.tolist()) == sorted(order.tolist())
    assert all(torch.equal(update.factors().U[:, slot], triplets[int(i)]) for slot, i in enumerate(update.order))
    torch.testing.assert_close(update.matrix(), before, rtol=0, atol=tolerance(torch.float64, 12))


def test_draws_speak_of_triplets_whatever_slots_they_lie_in() -> None:
    update = sst(torch.randn(12, 10), sampling="top")
    update._swap(torch.tensor([9, 1, 7, 3]))
    assert update._next(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pool", [None, 6])
def test_a_new_svd_keeps_the_weight_and_makes_the_vectors_orthonormal(pool: int | None) -> None:
    update = sst(torch.randn(12, 10, dtype=torch.float64), pool=pool)
    optimizer = torch.optim.AdamW([value for value in update.parameters() if value.requires_grad], lr=0.05)
    for _ in range(20):
        step(update, optimizer, torch.randn(5, 10, dtype=torch.float64))
    drifted, before = update.factors(), update.matrix()
    assert orthonormality_error(drifted.U) > 1e-2
    update._take(update._decomposed())
    torch.testing.assert_close(update.matrix(), before, rtol=0, atol=tolerance(torch.float64, 120))
    assert orthonormality_error(update.factors().U) < tolerance(torch.float64, 12)
    assert orthonormality_error(update.factors().Vh.mT) < tolerance(torch.float64, 12)
    assert not update.dS.weight.any()


def test_a_round_visits_the_svd_after_its_iterations() -> None:
    update = sst(torch.randn(12, 10), steps_per_iteration=2, iterations_per_round=3)
    optimizer = torch.optim.SGD([value for value in update.parameters() if value.requires_grad], lr=0.01)
    svds = []
    for number in range(1, 13):
        step(update, optimizer, torch.randn(5, 10))
        if not update.dS.weight.any():
            svds.append(number)
    assert svds == [6, 12]


def test_the_warm_up_multiplies_the_learning_rate() -> None:
    """Plain SGD on a fixed gradient: what S moves by is the rate that was in force."""
    update = sst(torch.eye(8), steps_per_iteration=6, warmup_steps=3)
    moved = []
    for outer in (1.0, 0.5) * 6:
        before = update.singular_values().detach().sum()
        update.dS.weight.grad = -torch.ones_like(update.dS.weight)
        optimizer = torch.optim.SGD([update.dS.weight], lr=1e-3 * outer)
        update.before_optimizer_step()
        optimizer.step()
        update.after_optimizer_step()
        moved.append(float(update.singular_values().detach().sum() - before) / (8e-3 * outer))
    expected = [0.25, 0.5, 0.75, 1, 1, 1] * 2
    assert moved == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("name", ["dS", "U", "Vh"])
def test_a_diverged_run_is_said_before_anything_is_swapped(name: str) -> None:
    update = sst(torch.randn(8, 8), steps_per_iteration=1)
    update.get_submodule(name).weight.data.view(-1)[0] = float("nan")
    order = update.order.clone()
    with pytest.raises(SpectralError, match=f"{name}.weight of layer holds NaN or Inf after 1 steps"):
        update.after_optimizer_step()
    assert torch.equal(update.order, order)


@pytest.mark.parametrize("sampling", ["mixture", "uniform", "singular_values", "sequential", "top"])
def test_draws_depend_on_nothing_but_the_adapter_s_own_seed(sampling: str) -> None:
    W = torch.randn(20, 20)
    torch.manual_seed(1)
    one = [sst(W, sampling=sampling)._next(i) for i in range(5)]
    torch.manual_seed(2)
    other = [sst(W, sampling=sampling)._next(i) for i in range(5)]
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))
    assert all(len(set(chosen.tolist())) == 4 for chosen in one)
    if sampling == "sequential":
        assert sorted(torch.cat(one).tolist()) == list(range(20))
    if sampling == "top":
        assert all(chosen.tolist() == [0, 1, 2, 3] for chosen in one)


def test_layers_and_seeds_draw_differently() -> None:
    W = torch.randn(64, 64)
    update = sst(W)
    assert not torch.equal(update._next(1), update._next(2))
    assert not torch.equal(update._next(1), sst(W, seed=1)._next(1))


def test_random_init_keeps_the_singular_values_only() -> None:
    W = torch.randn(12, 10)
    update = sst(W, init="random")
    torch.testing.assert_close(torch.linalg.svdvals(update.matrix()), torch.linalg.svdvals(W))
    assert (update.matrix() - W).norm() > W.norm() / 2


def test_frozen_vectors_can_be_held_in_bfloat16() -> None:
    W = torch.randn(32, 32)
    update = sst(W, frozen_dtype="bfloat16")
    assert {update.U_rest.weight.dtype, update.Vh_rest.weight.dtype} == {torch.bfloat16}
    assert update.U.weight.dtype == torch.float32
    error = (update.matrix() - W).norm() / W.norm()
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps_per_iteration": 0}, "`steps_per_iteration` should be at least 1, got 0"),
        ({"iterations_per_round": 0}, "`iterations_per_round` should be at least 1"),
        ({"warmup_steps": -1}, "`warmup_steps` should be at least 0"),
        ({"warmup_steps": 5, "steps_per_iteration": 5}, r"`warmup_steps` should be less than `steps_per_iteration`"),
        ({"pool": 0}, "`pool` should be at least 1"),
        ({"r": 16, "pool": 8}, r"`r` should be at most `pool` \(8\), got 16"),
        ({"sampling": "random"}, "`sampling` should be one of 'mixture'"),
        ({"gradient": "natural"}, "`gradient` should be one of 'enhanced', 'default'"),
        ({"init": "zero"}, "`init` should be one of 'svd', 'random'"),
        ({"frozen_dtype": "int8"}, "`frozen_dtype` should be one of None, 'bfloat16'"),
        ({"save_start": False}, "`save_start` should be True"),
        ({"r": 4, "pool": 8, "keep_base_weight": False}, "`keep_base_weight` should be True with a `pool`"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSTConfig(**fields)


@pytest.mark.parametrize("rows", [7, 150])  # by segments, and by way of W
def test_a_second_derivative_is_refused(rows: int) -> None:
    update, x = sst(torch.randn(16, 10)), torch.randn(rows, 10, requires_grad=True)
    (slope,) = torch.autograd.grad(update(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_in_float16_the_gradients_of_values_do_not_overflow() -> None:
    """A loss scale makes gradients of a few thousand usual."""
    update, x = sst(torch.randn(16, 16)), torch.randn(7, 16)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        update.dS.weight.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            update(100 * x).backward(torch.full((7, 16), 3000.0, dtype=dtype))
        gradients.append(update.dS.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2 * float(gradients[0].abs().max()))


def test_all_take_their_turn_over_short_rounds() -> None:
    update = sst(torch.randn(12, 12), r=2, sampling="sequential", steps_per_iteration=1, iterations_per_round=2)
    optimizer, seen = torch.optim.SGD(trainable(update), lr=0.0), set()
    for _ in range(6):
        seen.update(update.order[:2].tolist())
        step(update, optimizer, torch.randn(5, 12))
    assert seen == set(range(12))


@pytest.mark.parametrize("r", [4, 8])  # some of the vectors, and all
def test_what_starts_from_zero_reloads(r: int, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(copy.deepcopy(base), SSTConfig(r=r, target_modules=["0"], steps_per_iteration=1000))
    optimizer, x = torch.optim.Adam(trainable(model), lr=1e-2), torch.randn(5, 8)
    for _ in range(5):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    assert model(x).sub(base(x)).abs().max() > 1e-3
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("pool", [None, 8])
def test_trained_vectors_without_the_others_are_refused(pool: int | None) -> None:
    """Loop of a user who keeps the best of what requires a gradient: after a swap other triplets train."""
    model = get_peft_model(llama(), SSTConfig(r=4, pool=pool, target_modules=["up_proj"]))
    before = logits(model)
    kept = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    with pytest.raises(SpectralError, match=r"up_proj that train come without `order`.*get_peft_model_state_dict"):
        model.load_state_dict(kept, strict=False)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_a_whole_checkpoint_may_come_in_parts(parts: int) -> None:
    """The files of a large one end where they end, between the tensors of one weight too."""
    trained = get_peft_model(llama(), SSTConfig(r=4, steps_per_iteration=2, target_modules=["up_proj"]))
    train_(trained, lr=1e-2)
    tensors = list(trained.state_dict().items())
    model = get_peft_model(llama(), SSTConfig(r=4, steps_per_iteration=2, target_modules=["up_proj"]))
    size = -(-len(tensors) // parts)
    for first in range(0, len(tensors), size):
        model.load_state_dict(dict(tensors[first : first + size]), strict=False)
    assert torch.equal(logits(model), logits(trained))


def test_the_warm_up_ends_within_an_iteration() -> None:
    lengths = {200: 20, 100: 20, 50: 10, 4: 0, 1: 0}
    for steps, expected in lengths.items():
        schedule = SSTConfig(steps_per_iteration=steps).build(Size(8, 8, 4)).schedule
        assert schedule.warmup_steps == expected
        assert schedule.warmup(steps - 1) == 1


def test_a_random_start_differs_by_layer_and_seed() -> None:
    W = torch.randn(12, 8)
    starts = [
        SSTConfig(r=4, init="random", seed=seed).decompose(W, 4, key) for seed, key in [(0, "a"), (0, "b"), (1, "a")]
    ]
    again = SSTConfig(r=4, init="random").decompose(W, 4, "a")
    assert torch.equal(again.U, starts[0].U)
    for i in range(3):
        torch.testing.assert_close(starts[i].S, torch.linalg.svdvals(W))
        assert orthonormality_error(starts[i].U) < tolerance(torch.float32, 12)
        assert all(not torch.allclose(starts[i].U, starts[j].U, atol=0.1) for j in range(i))


@pytest.mark.parametrize("pool", [None, 6])
@pytest.mark.parametrize("enhanced", ["enhanced", "default"])
def test_an_expert_without_tokens(pool: int | None, enhanced: str) -> None:
    update = sst(torch.randn(12, 8), pool=pool, gradient=enhanced)
    y = update(torch.zeros(0, 8, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 12)
    assert not update.U.weight.grad.any()


def test_a_freed_base_weight_is_named_where_it_is_needed() -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear", keep_base_weight=False))
    kept = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear"))
    stored = [sum(value.numel() for value in each.parameters()) for each in (model, kept)]
    assert stored[1] - stored[0] == sum(update.matrix().numel() for update in updates(model))
    train_(model, lr=1e-2)
    with pytest.raises(SpectralError, match="keep_base_weight=True"), model.disable_adapter():
        model(batch())
    with pytest.raises(SpectralError, match="keep_base_weight=True"):
        next(layers(model)).get_delta_weight("default")
    expected = model.eval()(batch()).logits
    merged = model.merge_and_unload()
    rounding = tolerance(torch.float32, 32)
    torch.testing.assert_close(merged(batch()).logits, expected, rtol=rounding, atol=rounding)


def test_no_weight_is_lost_if_a_later_layer_fails() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SpectralError, match="up_proj"):
        get_peft_model(model, SSTConfig(r=4, target_modules="all-linear", keep_base_weight=False))
    expected = llama().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]) or "layers.1.mlp.up_proj" in name


def test_a_freed_checkpoint_reloads_and_frees_at_its_first_use(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear", keep_base_weight=False))
    train_(model, lr=1e-2)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(reloaded(batch()).logits, model.eval()(batch()).logits)
    assert all(layer.is_freed for layer in layers(reloaded))


def test_trained_parameters_in_the_paper_s_terms() -> None:
    """251,051,008 of LLaMA-1.3B (2048, 5461, 24 layers, 32,000 tokens, untied) train at r = 128, all else in full."""
    config, meta = SSTConfig(r=128), torch.device("meta")
    shapes = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    counts = []
    for m, n in shapes:
        update = config.build(Size(m, n, 128, device=meta))
        counts.append(sum(value.numel() for _, value in update.trained_parameters()))
        assert counts[-1] == 128 * (m + n) + min(m, n)
    rest = 2 * 32_000 * 2048 + (2 * 24 + 1) * 2048
    assert 24 * sum(counts) + rest == 251_051_008


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        ("order", lambda order: order.clamp(max=5), "order should hold the number of each of .* once, got 6"),
        ("order", lambda order: order + 1, "different ones from 1 to"),
        ("step", lambda step: step * 0 - 1, "step should count optimizer steps, got -1"),
    ],
)
@pytest.mark.parametrize("transformers_loads", [False, True])
def test_a_checkpoint_whose_indices_do_not_fit_is_refused(
    name: str, broken: Callable[[Tensor], Tensor], message: str, transformers_loads: bool, tmp_path: Path
) -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: broken(value) if key.endswith(f"update.{name}") else value for key, value in state.items()},
              tmp_path / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    base = llama()
    if transformers_loads:  # which knows no check before an adapter's first use
        base.load_adapter(str(tmp_path))
        with pytest.raises(SpectralError, match=message):
            logits(base)
        return
    with pytest.raises(SpectralError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), logits(llama()))


def test_everything_else_can_train_too() -> None:
    model = get_peft_model(
        llama(), SSTConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head", "norm"])
    )
    names = {name for name, value in model.named_parameters() if value.requires_grad}
    assert any("embed_tokens" in name for name in names)
    assert any("lm_head" in name for name in names)
    assert len(trainable(model)) > 3 * 14


def test_optimizer_state_of_what_was_swapped_is_reset() -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear", steps_per_iteration=3))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train_(model, lr=0, steps=2, optimizer=optimizer)
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())
    train_(model, lr=0, steps=1, optimizer=optimizer)
    for state in optimizer.state.values():
        assert int(state["step"]) == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert len(optimizer.state) == 3 * 14


def test_it_is_a_module_of_plain_parameters() -> None:
    assert isinstance(sst(torch.randn(4, 4)), nn.Module)
