import pytest
import torch

from recipe_lib.encoders.image import ImageEncoder

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
