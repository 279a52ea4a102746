"""SCT's own invariants: thin orthonormal factors in the place of the weight, and when they are retracted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import SCT, Calibration, RetractionRule, SCTConfig, Size, SpectralError, calibrate, export_lora
from spectral_peft.linalg import orthonormality_error
from spectral_peft.training import drive
from tests.models import batch, layers, llama, logits, train_, trainable, updates
from tests.tolerance import tolerance


RETRACTIONS = ("polar", "qr", "cholesky_qr")
SHAPES = [(24, 10), (10, 24), (16, 16)]
every_retraction = pytest.mark.parametrize("retraction", RETRACTIONS)


def sct(weight: Tensor, r: int = 4, key: str = "layer", **fields: object) -> SCT:
    """SCT on one weight."""
    config = SCTConfig(r=r, svd="exact", **fields)
    update = config.build(Size(*weight.shape, r, weight.dtype, key=key))
    config.start_(update, weight)
    update.freeze_start_()
    return update


def adapted(**fields: object) -> PeftModel:
    return get_peft_model(llama(), SCTConfig(**{"r": 4, "target_modules": "all-linear", **fields}))


def errors(update: SCT) -> list[float]:
    return [float(orthonormality_error(X)) for X in (update.U.weight, update.Vh.weight.mT)]


def move_(update: SCT, size: float = 0.01) -> None:
    """What an optimizer would do to the factors."""
    for _, value in update.trained_parameters():
        value.data.add_(torch.randn_like(value), alpha=size)


# The function


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_the_dense_layer_and_merges_back(shape: tuple[int, int]) -> None:
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m))
    W, bias, x = model[0].weight.detach().clone(), model[0].bias.detach().clone(), torch.randn(7, n)
    expected = model(x)
    adapter = get_peft_model(model, SCTConfig(r=min(shape), target_modules=["0"]))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-5, atol=1e-5)
    merged = adapter.merge_and_unload()[0]
    torch.testing.assert_close(merged.weight.data, W, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.bias, bias)


def test_u_is_the_output_side() -> None:
    """The paper calls the input side U."""
    update = sct(torch.randn(24, 10))
    assert update.U.weight.shape == (24, 4)
    assert update.Vh.weight.shape == (4, 10)
    assert update(torch.randn(3, 10)).shape == (3, 24)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_projections_of_the_dense_gradient(shape: tuple[int, int]) -> None:
    update = sct(torch.randn(shape, dtype=torch.float64))
    W = update.matrix().detach().requires_grad_()
    x = torch.randn(7, shape[1], dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, shape[0], dtype=torch.float64)
    (x @ W.T).backward(g)
    G, dx = W.grad, x.grad.clone()
    x.grad = None
    update(x).backward(g)
    U, S, Vh = update.U.weight, update.singular_values().detach(), update.Vh.weight
    torch.testing.assert_close(U.grad, G @ Vh.T * S)
    torch.testing.assert_close(update.dS.weight.grad, torch.diag(U.T @ G @ Vh.T))
    torch.testing.assert_close(Vh.grad, S[:, None] * (U.T @ G))
    torch.testing.assert_close(x.grad, dx)


def test_embeddings_and_head_can_be_factored_too() -> None:
    base = llama()
    model = get_peft_model(base, SCTConfig(r=16, target_modules=["embed_tokens", "lm_head", "q_proj"]))
    assert sorted(layer.key.rpartition(".")[2] for layer in layers(model)) == [
        "embed_tokens", "lm_head", "q_proj", "q_proj",
    ]  # fmt: skip
    before = logits(model)
    train_(model, lr=1e-2)
    assert not torch.equal(logits(model), before)
    assert max(error for update in updates(model) for error in errors(update)) < tolerance(torch.float32, 64)


def test_an_embedding_keeps_its_dtype_under_autocast() -> None:
    """Autocast leaves lookups alone: the residual stream that starts there stays float32."""
    base = nn.Sequential(nn.Embedding(20, 8))
    model = get_peft_model(base, SCTConfig(r=4, target_modules=["0"]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.arange(5)).dtype == torch.float32


# The base weight


def test_the_base_weight_is_freed_and_named_where_it_is_needed(tmp_path: Path) -> None:
    model = adapted()
    assert all(layer.is_freed for layer in layers(model))
    kept = adapted(keep_base_weight=True)
    stored = [sum(value.numel() for value in each.parameters()) for each in (model, kept)]
    assert stored[1] - stored[0] == sum(update.matrix().numel() for update in updates(model))
    train_(model, lr=1e-2)
    with pytest.raises(SpectralError, match="keep_base_weight=True"), model.disable_adapter():
        model(batch())
    with pytest.raises(SpectralError, match="keep_base_weight=True"):
        model.add_adapter("second", SCTConfig(r=4, target_modules="all-linear"))
    with pytest.raises(SpectralError, match="keep_base_weight=True"):
        export_lora(model, tmp_path, rank=4)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)  # looks at all layers first, and needs no base weight for that
    rounding = tolerance(torch.float32, 32)
    torch.testing.assert_close(logits(merged), expected, rtol=rounding, atol=rounding)


def test_a_freed_checkpoint_reloads_and_frees_at_its_first_use(tmp_path: Path) -> None:
    model = adapted()
    train_(model, lr=1e-2)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert all(layer.is_freed for layer in layers(reloaded))


def test_a_weight_of_zeros_trains_and_reloads(tmp_path: Path) -> None:
    """All its singular values are zero, which looks like an adapter that nothing has started."""

    def zero_base() -> nn.Module:
        base = llama()
        base.model.layers[0].mlp.down_proj.weight.data.zero_()
        return base

    model = get_peft_model(zero_base(), SCTConfig(r=4, target_modules=["down_proj"]))
    train_(model, lr=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(zero_base(), tmp_path)), logits(model))


# Retraction


@every_retraction
@pytest.mark.parametrize("gradient", ["euclidean", "riemannian"])
def test_factors_are_orthonormal_after_training(retraction: str, gradient: str) -> None:
    model = adapted(retraction=retraction, gradient=gradient)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    train_(model, lr=1e-2)
    assert max(error for update in updates(model) for error in errors(update)) < tolerance(torch.float32, 48)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before


def test_bfloat16_factors_are_orthonormal_up_to_their_rounding() -> None:
    model = get_peft_model(
        llama(torch.bfloat16), SCTConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    train_(model, lr=1e-2)
    assert max(error for update in updates(model) for error in errors(update)) < tolerance(torch.bfloat16, 1)


@every_retraction
def test_a_second_retraction_changes_nothing(retraction: str) -> None:
    update = sct(torch.randn(24, 10, dtype=torch.float64), retraction=retraction)
    move_(update)
    update.after_optimizer_step()
    before = update.matrix()
    update.after_optimizer_step()
    torch.testing.assert_close(update.matrix(), before, rtol=0, atol=tolerance(torch.float64, 24))


@every_retraction
@pytest.mark.parametrize("broken", ["a zero column", "equal columns"])
def test_columns_survive_a_loss_of_rank(retraction: str, broken: str) -> None:
    """The paper's Q * sign(diag(R)) makes such a column zero, and zero it stays."""
    update = sct(torch.randn(24, 10), retraction=retraction)
    update.U.weight.data[:, 3] = 0 if broken == "a zero column" else update.U.weight.data[:, 2]
    untouched = update.U.weight[:, :2].clone()
    update.after_optimizer_step()
    assert max(errors(update)) < tolerance(torch.float32, 24)
    torch.testing.assert_close(update.U.weight[:, :2], untouched, rtol=0, atol=tolerance(torch.float32, 24))


def test_singular_values_may_become_negative() -> None:
    update = sct(torch.randn(12, 10))
    update.dS.weight.data -= 2 * update.S.weight
    values = update.singular_values()
    update.after_optimizer_step()
    assert torch.equal(update.singular_values(), values)
    assert (values < 0).all()


def counted(update: SCT, steps: int) -> list[int]:
    """The steps, from 1, after which the factors were orthonormal."""
    retracted = []
    for number in range(1, steps + 1):
        move_(update)
        update.after_optimizer_step()
        if max(errors(update)) < 1e-5:
            retracted.append(number)
    return retracted


def test_retract_every() -> None:
    assert counted(sct(torch.randn(24, 10)), 4) == [1, 2, 3, 4]
    update = sct(torch.randn(24, 10), retract_every=3)
    assert counted(update, 10) == [3, 6, 9]
    update.start_random_(0.02)  # a new start counts anew
    assert counted(update, 4) == [3]


@pytest.mark.parametrize("absorb", [False, True])
def test_a_tolerance_is_for_every_factor_what_it_says(absorb: bool) -> None:
    update = sct(torch.randn(24, 10), retract_tolerance=1e-2, absorb=absorb)
    update.U.weight.data *= 1 + 0.4e-2  # an error of 0.8e-2
    before = update.U.weight.clone()
    assert not update.after_optimizer_step()
    assert torch.equal(update.U.weight, before)
    update.U.weight.data *= 1 + 0.4e-2  # 1.6e-2
    V = update.Vh.weight.clone()
    update.after_optimizer_step()
    assert max(errors(update)) < 1e-5
    assert absorb or torch.equal(update.Vh.weight, V)


@pytest.mark.parametrize("shape", SHAPES)
def test_absorb_leaves_the_weight_as_it_is(shape: tuple[int, int]) -> None:
    update = sct(torch.randn(shape, dtype=torch.float64), absorb=True)
    move_(update, 0.1)
    before = update.matrix()
    stale = update.after_optimizer_step()
    torch.testing.assert_close(update.matrix(), before, rtol=0, atol=tolerance(torch.float64, 24))
    assert max(errors(update)) < tolerance(torch.float64, 24)
    assert {id(value) for value in stale} == {id(value) for _, value in update.trained_parameters()}
    plain = sct(torch.randn(shape, dtype=torch.float64))
    move_(plain, 0.1)
    before = plain.matrix()
    assert plain.after_optimizer_step() == []
    assert (plain.matrix() - before).norm() > 1e-3


def test_optimizer_state_is_reset_where_absorb_turned_the_factors() -> None:
    model = adapted(absorb=True, retract_every=3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    train_(model, lr=0, steps=2, optimizer=optimizer)
    assert all(int(state["step"]) == 2 for state in optimizer.state.values())
    train_(model, lr=0, steps=1, optimizer=optimizer)
    assert len(optimizer.state) == 3 * 14
    assert all(int(state["step"]) == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("fields", [{"retract_every": 4}, {"retract_every": 4, "absorb": True}])
def test_an_interrupted_run_equals_an_uninterrupted_one(fields: dict[str, object], tmp_path: Path) -> None:
    """Stopped between two retractions: the count of steps goes on."""
    whole = adapted(**fields)
    optimizer = torch.optim.AdamW(trainable(whole), lr=1e-2)
    train_(whole, lr=0, steps=3, optimizer=optimizer)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train_(whole, lr=0, steps=3, optimizer=optimizer)

    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(resumed), lr=1e-2)
    optimizer.load_state_dict(state)
    train_(resumed, lr=0, steps=3, optimizer=optimizer)
    assert {int(update.step) for update in updates(resumed)} == {6}
    assert torch.equal(logits(resumed), logits(whole))


def test_a_checkpoint_with_an_impossible_count_is_refused(tmp_path: Path) -> None:
    adapted(retract_every=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {name: value - 1 if name.endswith("step") else value for name, value in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    with pytest.raises(SpectralError, match="step should count optimizer steps, got -1"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(("name", "absorb"), [("U", False), ("Vh", False), ("U", True), ("Vh", True), ("dS", True)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_run_is_said_before_anything_changes(name: str, absorb: bool, value: float) -> None:
    group = [sct(torch.randn(12, 10), key=key, absorb=absorb, retract_every=2) for key in ("first", "second")]
    for update in group:
        move_(update)
        update.step += 1
    group[1].get_submodule(name).weight.data.view(-1)[5 % 4] = value
    before = copy.deepcopy([update.state_dict() for update in group])
    with pytest.raises(SpectralError, match=f"{name} of second holds NaN or Inf: the training has diverged"):
        SCT.after_optimizer_step_of(group)
    for update, state in zip(group, before, strict=True):
        for key, tensor in update.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=0, atol=0, equal_nan=True)


# The Riemannian mode


def test_gradients_and_steps_are_tangent() -> None:
    """X^T D is antisymmetric for every direction D along which X stays orthonormal."""
    update = sct(torch.randn(24, 10, dtype=torch.float64), gradient="riemannian")
    factors = {"U": lambda M: M, "Vh": lambda M: M.mT}
    X = {name: tall(update.get_submodule(name).weight.detach().clone()) for name, tall in factors.items()}
    update(torch.randn(5, 10, dtype=torch.float64)).square().sum().backward()
    raw = update.U.weight.grad.clone()
    update.before_optimizer_step()
    for name, tall in factors.items():
        core = X[name].T @ tall(update.get_submodule(name).weight.grad)
        torch.testing.assert_close(core, -core.T)
    core = X["U"].T @ raw
    torch.testing.assert_close(update.U.weight.grad, raw - X["U"] @ (core + core.T) / 2)

    steps = {name: torch.randn_like(value) for name, value in X.items()}
    for name, tall in factors.items():
        tall(update.get_submodule(name).weight.data).add_(steps[name], alpha=0.1)
    with torch.no_grad():
        update._project_step_()
    for name, tall in factors.items():
        core = X[name].T @ steps[name]
        expected = X[name] + 0.1 * (steps[name] - X[name] @ (core + core.T) / 2)
        torch.testing.assert_close(tall(update.get_submodule(name).weight.detach()), expected)


def linear_problem(retraction: str, riemannian: bool) -> tuple[float, float]:
    """The largest tr(M^T U) over orthonormal U, a sum of singular values; and what Adam reaches with SCT's factor."""
    M = torch.randn(20, 24, dtype=torch.float64).T @ torch.randn(20, 6, dtype=torch.float64)
    M *= 10 / M.norm()
    update = SCT(Size(24, 10, 6, torch.float64), RetractionRule(retraction, riemannian=riemannian))
    update.start_random_(1.0)
    drive([update])
    optimizer = torch.optim.Adam([update.U.weight], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        (-(M * update.U.weight).sum()).backward()
        optimizer.step()
        schedule.step()
    return float(torch.linalg.svdvals(M).sum()), float((M * update.U.weight.detach()).sum())


@every_retraction
def test_the_riemannian_mode_reaches_the_optimum_where_the_paper_s_rule_does_not(retraction: str) -> None:
    optimum, reached = linear_problem(retraction, riemannian=True)
    assert reached == pytest.approx(optimum, rel=1e-9)
    optimum, reached = linear_problem(retraction, riemannian=False)
    assert reached < 0.9 * optimum


def test_no_copy_of_the_factors_is_made_without_it() -> None:
    update = sct(torch.randn(12, 10))
    update(torch.randn(3, 10)).sum().backward()
    gradient = update.U.weight.grad.clone()
    update.before_optimizer_step()
    assert update._before == []
    assert torch.equal(update.U.weight.grad, gradient)


# The random start


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_start_has_the_norm_of_the_weight_and_nothing_else_of_it(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    W = 0.02 * torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "svd", None)
    update = sct(W, init="random")
    torch.testing.assert_close(update.matrix().norm(), W.norm())
    assert max(errors(update)) < tolerance(torch.float64, 24)
    assert len(set(update.S.weight.tolist())) == 1
    assert torch.equal(sct(W[:, torch.randperm(shape[1])], init="random").U.weight, update.U.weight)


def test_a_random_start_needs_no_weight() -> None:
    update, m, n, r = SCTConfig(init="random").build(Size(24, 10, 4)), 24, 10, 4
    update.start_random_(0.02)
    torch.testing.assert_close(update.S.weight.data, torch.full((r,), 0.02 * (m * n / r) ** 0.5))


def test_a_random_start_depends_on_the_seed_and_the_name_alone() -> None:
    W = torch.randn(12, 10)
    state = torch.get_rng_state()
    one = sct(W, init="random")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(sct(W, init="random").U.weight, one.U.weight)
    assert not torch.equal(sct(W, init="random", seed=1).U.weight, one.U.weight)
    assert not torch.equal(sct(W, init="random", key="other").U.weight, one.U.weight)


def test_a_random_start_of_a_broken_weight_is_refused() -> None:
    base = llama()
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SpectralError, match=r"^model\.layers\.1\.mlp\.up_proj: .*1 NaN"):
        get_peft_model(base, SCTConfig(r=4, target_modules="all-linear", init="random"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retraction": "cayley"}, "`retraction` should be one of 'polar', 'qr', 'cholesky_qr', got 'cayley'"),
        ({"gradient": "natural"}, "`gradient` should be one of 'euclidean', 'riemannian'"),
        ({"init": "zero"}, "`init` should be one of 'svd', 'random'"),
        ({"retract_every": 0}, "`retract_every` should be at least 1, got 0"),
        ({"retract_tolerance": 0.0}, r"`retract_tolerance` should be positive, or None for .*, got 0\.0"),
        ({"retract_tolerance": float("nan")}, "`retract_tolerance` should be positive"),
        ({"save_start": False}, "`save_start` should be True"),
        ({"init_std": 0.1}, '`init_std` is for `init="random"`'),
        ({"init": "random", "calibration": Calibration({}, {})}, '`calibration` is for `init="svd"`'),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCTConfig(**fields)


# The paper's arithmetic


def trained_numbers(m: int, n: int, r: int) -> int:
    update = SCTConfig(r=r).build(Size(m, n, r, device=torch.device("meta")))
    return sum(value.numel() for _, value in update.trained_parameters())


def test_the_paper_s_memory_ratio_of_one_matrix() -> None:
    """Weight, gradient and two moments in float32 of one MLP matrix of LLaMA-70B at rank 32."""
    dense, factors = 16 * 8192 * 28672 / 1e6, 16 * trained_numbers(8192, 28672, 32) / 1e6
    assert round(dense, 1) == 3758.1
    assert round(factors, 1) == 18.9
    assert round(dense / factors, 1) == 199.1


def test_the_paper_s_stack_of_80_layers() -> None:
    """Four square attention matrices, three of the MLP and two norms in each layer, at rank 32."""
    shapes = [(8192, 8192)] * 4 + [(28672, 8192)] * 2 + [(8192, 28672)]
    assert 80 * (sum(trained_numbers(m, n, 32) for m, n in shapes) + 2 * 8192) == 452_216_320


def test_smollm2_with_mlps_of_rank_32() -> None:
    """The paper's 527 million parameters of SmolLM2-1.7B, whose MLPs are 8192 wide."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                tie_word_embeddings=True,
            )
        )
    dense = sum(value.numel() for value in model.parameters())
    mlp = [value for name, value in model.named_parameters() if ".mlp." in name]
    factors = sum(trained_numbers(*value.shape, 32) for value in mlp)
    assert dense == 1_711_376_384
    assert dense - sum(value.numel() for value in mlp) + factors == 527_012_096


def test_a_calibrated_start_serves_the_inputs_better() -> None:
    """And only these: the plain one is the better approximation of the weights."""
    ids = [batch(seed) for seed in range(4)]
    calibration = calibrate(llama(), ids, ["up_proj", "gate_proj"])
    errors, distances = [], []
    for given in (None, calibration):
        config = SCTConfig(r=6, target_modules=["up_proj", "gate_proj"], calibration=given)
        model = get_peft_model(llama(), config)
        errors.append(float((logits(model, ids[0]) - logits(llama(), ids[0])).norm()))
        weights = [llama().get_submodule(layer.key).weight for layer in layers(model)]
        distances.append(sum(float((u.matrix() - W).norm()) for u, W in zip(updates(model), weights, strict=True)))
    assert errors[1] < 0.9 * errors[0]
    assert distances[1] > distances[0]


def test_a_calibration_gives_ranks_to_a_random_start() -> None:
    ids = [batch(seed) for seed in range(4)]
    names = ["up_proj", "gate_proj", "down_proj", "q_proj", "o_proj"]
    calibration = calibrate(llama(), ids, names)
    ranks = []
    for given in (None, calibration):
        config = SCTConfig(r="energy=0.8", target_modules=names, init="random", calibration=given)
        ranks.append([update.r for update in updates(get_peft_model(llama(), config))])
    assert ranks[0] != ranks[1]


def test_a_budget_is_kept(tmp_path: Path) -> None:
    dense = sum(layer.weight.numel() for layer in llama().modules() if isinstance(layer, nn.Linear)) - 64 * 32
    model = get_peft_model(llama(), SCTConfig(r="budget=0.4", target_modules="all-linear"))
    held = sum(value.numel() for update in updates(model) for _, value in update.trained_parameters())
    held += sum(llama().get_submodule(name).weight.numel() for name in model.peft_config["default"].dense_modules)
    assert 0.39 * dense < held <= 0.4 * dense
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
