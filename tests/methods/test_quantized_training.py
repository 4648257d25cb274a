"""Training at low widths and with two passes, through the engine: SAQ, plain QAT, SAM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gossamer.conformance.running import differing, example_batch, outputs, run
from gossamer.cost.ledger import cost
from gossamer.kits.example import MethodExample, tiny_vit
from gossamer.kits.qat import qat_layers
from gossamer.methods.qat import QAT
from gossamer.methods.sam import SAM
from gossamer.methods.saq import SAQ
from gossamer.methods.saq.example import example, tiny_resnet
from gossamer.ops.int8 import Int8Conv2d, Int8Linear


def _fixed(method):
    return run(replace(example(), method=lambda: method), [method])


def test_radius_zero_is_plain_quantization_aware_training_bit_for_bit() -> None:
    ours, theirs = _fixed(SAQ(rho=0.0, bits=3)), _fixed(QAT(bits=3))
    assert not differing(ours.model, theirs.model)
    assert differing(_fixed(SAQ(rho=0.4, bits=3)).model, theirs.model)


@pytest.mark.parametrize("placement", ["mixed", "float", "quantized"])
@pytest.mark.parametrize("adaptive", ["no", "asam"])
def test_every_ablation_runs(placement: str, adaptive: str) -> None:
    done = _fixed(SAQ(bits=2, placement=placement, adaptive=adaptive, perturb=["weights", "weight_clip"]))
    assert torch.isfinite(outputs(done.model, example_batch(example()))).all()


def test_a_vision_transformer_trains_and_finishes() -> None:
    case = replace(example(), model=tiny_vit)
    done = run(case, [SAQ(bits=4, rho=0.1, clip_start="mse")])
    assert {type(m) for m in done.model.modules()} >= {Int8Linear, Int8Conv2d}


def test_a_finished_model_is_the_trained_one_in_integers() -> None:
    class Kept(SAQ):
        def finish(self, model):
            self.kept = outputs(model, example_batch(example()))
            return super().finish(model)

    method = Kept(bits=[2, 3, 4, 5, 6, 7], round_sums=False)
    done = _fixed(method)
    gap = (outputs(done.model, example_batch(example())) - method.kept).abs().max()
    assert gap <= 1e-4 * method.kept.abs().max()
    layers = [m for m in done.model.modules() if isinstance(m, Int8Conv2d | Int8Linear)]
    assert sorted(m.weight_bits for m in layers) == [2, 3, 4, 5, 5, 6, 7, 7, 8, 8]
    assert all(m.weight.dtype == torch.int8 for m in layers)
    norms = [n for n, m in done.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3  # a sum comes before these
    assert not any(n.endswith("bn2") for n in norms)  # the others are folded


def test_changing_one_layers_width_changes_the_output() -> None:
    ends = [_fixed(SAQ(bits=bits)).model for bits in ([4] * 6, [4, 4, 4, 3, 4, 4])]
    batch = example_batch(example())
    assert not torch.equal(outputs(ends[0], batch), outputs(ends[1], batch))
    assert cost(ends[0], saved=False).bops > cost(ends[1], saved=False).bops


@pytest.mark.parametrize("choose", ["perturbed", "sharpness"])
def test_fine_tuning_starts_from_the_float_weights_at_the_found_widths(choose: str) -> None:
    seen = {}

    class Spy(SAQ):
        def enter(self, model, phase):
            edit = super().enter(model, phase)
            if phase.name == "fit":
                seen.update({n: (m.weight.detach().clone(), m.widths) for n, m in qat_layers(model).items()})
            return edit

    options = {"search": True, "search_steps": 3, "candidates": 3, "derive_batches": 1, "band": 0.2}
    done = run(example(), [Spy(**options, choose=choose)])
    edit = next(e for _, e in done.stack.edits if e["do"] == "rewrap")
    dense = tiny_resnet()
    assert all(torch.equal(w, dense.get_submodule(n).weight) for n, (w, _) in seen.items())
    layout = done.stack.methods[0]._layout
    assert {n: w for n, (_, w) in seen.items()} == layout.widths([tuple(b) for b in edit["bits"]])
    assert edit["found"][choose] == min(c[choose] for c in edit["candidates"])
    target = layout.bops(layout.widths(4))
    assert all(0.8 * target <= c["bops"] <= target for c in edit["candidates"])
    released = run(example(), [SAQ(release=True, bits=4, **options)])
    assert {m.weight_bits for m in released.model.modules() if isinstance(m, Int8Conv2d)} == {4, 8}
    tables = done.stack.methods[0].describe(done.model)["tables"]
    assert len(tables[1]["rows"]) == 3


def test_separate_widths_for_weights_and_activations() -> None:
    done = run(
        example(),
        [SAQ(search=True, share=False, choices=[2, 4], search_steps=3, candidates=2, band=0.5, derive_batches=1)],
    )
    edit = next(e for _, e in done.stack.edits if e["do"] == "rewrap")
    assert any(w != a for w, a in edit["bits"])


def test_a_finished_transformer_is_the_trained_one_in_integers() -> None:
    example = MethodExample(method=lambda: QAT(bits=3, clip_start="mse"))
    kept = {}

    class Kept(QAT):
        def finish(self, model):
            kept["trained"] = outputs(model, example_batch(example))
            return super().finish(model)

    done = run(example, [Kept(bits=3, clip_start="mse")])
    kinds = {type(m) for m in done.model.modules()}
    assert {Int8Linear, Int8Conv2d} <= kinds and not qat_layers(done.model)
    gap = (outputs(done.model, example_batch(example)) - kept["trained"]).abs().max()
    assert gap <= 1e-4 * kept["trained"].abs().max()
    assert {m.weight_bits for m in done.model.modules() if isinstance(m, Int8Linear)} == {3, 8}


def test_image_can_be_quantized() -> None:
    example = MethodExample(method=lambda: QAT(bits=4, quantize_image=True))
    first = run(example).model.patch_embed.proj
    assert first.input_bits == 8 and first.grids.input_grid == "signed"


def test_radius_zero_is_plain_training_and_others_are_not() -> None:
    example = MethodExample(method=lambda: SAM(rho=0.0))
    plain, zero, sharp = (run(example, methods).model for methods in ([], [SAM(rho=0.0)], [SAM(rho=0.1)]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), sharp.parameters(), strict=True))


def test_adaptive_and_plain_forms_differ() -> None:
    example = MethodExample(method=SAM)
    ends = [run(example, [SAM(rho=0.1, adaptive=a)]).model.head.weight for a in (False, True)]
    assert not torch.equal(*ends)


def test_qat_with_sam_is_saq_at_one_width() -> None:
    kinds = ["weights", "norm", "bias", "act_clip"]
    two = run(example(), [QAT(bits=3), SAM(rho=0.2, perturb=kinds, norm_updates="both")]).model
    assert not differing(two, _fixed(SAQ(bits=3, rho=0.2)).model)


def test_rounded_sums_stay_near_the_trained_model() -> None:
    exact, rounded = (_fixed(SAQ(bits=4, round_sums=r)) for r in (False, True))
    batch = example_batch(example())
    gap = outputs(rounded.model, batch) - outputs(exact.model, batch)
    assert 0 < gap.norm() < 0.1 * outputs(exact.model, batch).norm()
    sums = [e["sums"] for _, e in rounded.stack.edits if e["do"] == "finish"]
    assert set(sums[0]) == {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer2.0.downsample"} | set(
        n for n in sums[0] if "downsample" in n
    )
