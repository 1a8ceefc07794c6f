import pytest
import torch
from torch import nn

from recipe_lib.encoders.image import ImageEncoder, check_frozen

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "args", "channels", "side"),
    [
        ("test_resnet", ["output_stride: 16"], 96, 4),
        ("test_vit", ["img_size: 64"], 64, 4),
        ("test_convnext", [], 64, 2),
        ("mobilenetv3_small_050", [], 288, 2),
        ("swin_tiny_patch4_window7_224", ["img_size: 64", "depths: [1, 1, 1, 1]"], 768, 2),
    ],
)
def test_any_backbone_gives_a_map_and_an_embedding(model, args, channels, side):
    encoder = ImageEncoder(model, 8, model_args=args).eval()
    features = encoder.features(IMAGES)
    assert encoder.channels == channels and encoder.feature_map(features).shape == (2, channels, side, side)
    embedding = encoder(IMAGES)
    assert embedding.shape == (2, 8) and embedding.abs().max() < 1


def test_patches_lie_where_they_are_in_the_photo():
    encoder = ImageEncoder("test_vit", 8, model_args=["img_size: 64"]).eval()
    tokens = torch.arange(1 + 16).float()[None, :, None].expand(1, 17, 64)
    grid = encoder.feature_map(tokens)[0, 0]
    assert encoder.backbone.num_prefix_tokens == 1 and grid.flatten().tolist() == list(range(1, 17))
    assert grid[1, 2] == 1 + 4 + 2, "row by row"


def test_statistics_follow_the_weights():
    encoder = ImageEncoder("test_resnet", 8)
    config = encoder.backbone.pretrained_cfg
    assert encoder.mean.flatten().tolist() == pytest.approx([255 * x for x in config["mean"]])
    assert {"mean", "std"} <= set(encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("half", [0.5] * 3, [0.5] * 3)],
)
def test_statistics_of_other_weights(name, mean, std):
    """The augreg ViT's config says .5; the released H-T code normalises its photos with ImageNet's all the same."""
    encoder = ImageEncoder("test_vit", 8, model_args=["img_size: 64"], normalisation=name)
    assert encoder.mean.flatten().tolist() == pytest.approx([255 * x for x in mean])
    assert encoder.std.flatten().tolist() == pytest.approx([255 * x for x in std])


# ---- frozen parts ----


@pytest.mark.parametrize(
    ("model", "args", "frozen"),
    [
        ("test_resnet", [], ["conv1", "bn1", "layer1"]),
        ("test_resnet", [], ["all"]),
        ("test_vit", ["img_size: 64"], ["patch_embed", "pos_embed", "cls_token", "blocks.0"]),
    ],
)
def test_what_is_frozen_never_moves(model, args, frozen):
    """Neither weights nor statistics, whatever train() is called on and however large the decay."""
    torch.manual_seed(0)
    encoder = ImageEncoder(model, 8, model_args=args, frozen=frozen)
    check_frozen(model, args, frozen)

    def is_frozen(name):
        path = name.removeprefix("backbone.")
        return name != path and (frozen == ["all"] or any(path == f or path.startswith(f"{f}.") for f in frozen))

    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    whole = nn.Sequential(encoder).eval().train()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        whole(IMAGES).sum().backward()
        optimizer.step()
    moved = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not [name for name in moved if is_frozen(name)]
    trainable = {name for name, parameter in encoder.named_parameters() if not is_frozen(name)}
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == trainable
    # test_resnet is ended by an fc that timm leaves out, so every parameter that is not frozen is used.
    assert {name for name, _ in encoder.named_parameters()} & moved == trainable


def test_no_graph_is_kept_of_what_is_frozen_first():
    encoder, seen = ImageEncoder("test_resnet", 8, frozen=["conv1", "bn1", "layer1"]), []
    for name in ("layer1", "layer2"):
        encoder.backbone.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    encoder(IMAGES)
    assert seen == [False, True]


@pytest.mark.parametrize("name", ["layr1", "blocks.0", ""])
def test_a_part_that_is_not_there_is_named_with_those_that_are(name):
    for build in (
        lambda: ImageEncoder("test_resnet", 8, frozen=[name]),
        lambda: check_frozen("test_resnet", [], ["conv1", name]),
    ):
        with pytest.raises(ValueError, match=rf"frozen '{name}'.*all, conv1, bn1.*layer1, layer2") as error:
            build()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "args", "word"),
    [
        ("resnet51", [], "no such model"),
        ("test_resnet", ["output_stride"], "key: value"),
        ("test_resnet", ["no_such_option: 1"], "does not take"),
    ],
)
def test_mistakes_are_named(model, args, word):
    with pytest.raises(ValueError, match=word):
        ImageEncoder(model, 8, model_args=args)


def test_weights_that_cannot_be_fetched_give_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="pretrained: true") as error:
        ImageEncoder("test_resnet.r160_in1k", 8, pretrained=True)
    assert "\n" not in str(error.value)
