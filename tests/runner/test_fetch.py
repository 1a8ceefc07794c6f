"""fetch: what a run would ask the hub for, from a small hub on this machine; then loaded with that switched off."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
from safetensors.torch import save_file

from recipe_lib.runner import params
from recipe_lib.runner.fetch import _studies, wanted
from tests.data.test_descriptions import RECIPES, build_model

REPOSITORY = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
RESNET, CHAT = "timm/test_resnet.r160_in1k", "someone/chat"
OWN = REPOSITORY / "tests/systems/my_system.py"  # a backbone of timm, and nothing said about descriptions


@pytest.fixture(scope="module")
def schema():
    return params.declared(sorted(REPOSITORY.glob("notebooks/*.ipynb")))


@pytest.mark.parametrize(
    ("files", "given", "repos"),
    [
        ("kitchen", {}, {}),
        ("recipe1m", {}, {"image_model": "timm/resnet50.tv_in1k"}),
        ("recipe1m", {"weights_from": "model-best.ckpt"}, {}),
        ("recipe1m methods/ht_vit", {}, {"image_model": "timm/vit_base_patch16_224.orig_in21k_ft_in1k"}),
        (
            "recipe1m methods/dar",
            {},
            {
                "description_model": "meta-llama/Llama-2-13b-chat-hf",
                "segment_model": "facebook/sam-vit-huge",
                "clip_pretrained": "timm/vit_base_patch16_clip_224.openai",
            },
        ),
        ("recipe1m methods/dar", {"description_backend": "given", "segment_backend": "given", "weights_from": "x"}, {}),
        (  # the towers' weights are those of weights_from, but CLIP ranks the segments
            "recipe1m methods/dar",
            {"description_model": "params", "segment_backend": "superpixels", "weights_from": "model-best.ckpt"},
            {"clip_pretrained": "timm/vit_base_patch16_clip_224.openai"},
        ),
        ("kitchen methods/dar", {}, {}),
        ("cookbook", {"pretrained": True, "image_model": "test_resnet"}, {"image_model": RESNET}),
    ],
)
def test_only_what_the_run_uses_is_wanted(schema, files, given, repos):
    files = [REPOSITORY / f"params/{name}.yaml" for name in files.split()]
    given = {"source_dir": "data"} | given
    overrides = [(key, str(value).lower() if value is True else str(value)) for key, value in given.items()]
    assert {one.parameter: one.repo for one in wanted(params.load(files, overrides, schema))} == repos


def test_of_a_grid_what_each_of_its_studies_uses():
    given = {"methods": "[ht, dar]", "seeds": "[1, 2]", "pretrained": "true", "clip_pretrained": "openai"}
    given |= {"clip_model": "ViT-B-16", "image_size": "224", "crop_size": "224"}
    studies = [wanted(values) for values in _studies([REPOSITORY / "params/kitchen.yaml"], [*given.items()])]
    of_ht, of_dar = [("image_model", RESNET)], [("clip_pretrained", "timm/vit_base_patch16_clip_224.openai")]
    assert [[(one.parameter, one.repo) for one in found] for found in studies] == [of_ht, of_ht, of_dar, of_dar]


def test_names_that_nobody_publishes(schema):
    def resnet(tag):
        return wanted(params.load([], [("pretrained", "true"), ("image_model", tag)], schema))

    with pytest.raises(ValueError, match="image_model test_resnet.no_tag: timm has no such weights"):
        resnet("test_resnet.no_tag")
    assert resnet("legacy_senet154")[0].repo == "", "published, but not on the hub"


# ---- a hub ----


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs to list and get files; `gated` asks for an account."""

    def __init__(self, root: Path, *args):
        self.root = root
        super().__init__(*args)

    def do_GET(self, body: bool = True):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            repo = "/".join(path.split("/")[2:4])
            files = sorted(path.name for path in (self.root / repo).glob("*"))
            tree = [{"type": "file", "path": f, "size": 1, "oid": f} for f in files]
            answer = tree if "/tree/" in path else {"id": repo, "sha": SHA, "siblings": []}
            self.send(
                200 if files else 404, json.dumps(answer).encode(), {} if files else {"X-Error-Code": "RepoNotFound"}
            )
            return
        repo, _, file = path.partition("/resolve/")
        file = self.root / repo / file.partition("/")[2]
        if "gated" in repo:
            self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not file.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            with (self.root / "asked").open("a") as log:
                print(file.name, file=log)
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            self.send(200, content, headers, body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def send(self, status, content, headers, body=True):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of repositories, and its address."""
    root = tmp_path_factory.mktemp("hub")
    build_model(root / CHAT, chat=True)
    build_model(root / "someone/gated", chat=True)
    (root / "someone/pickled").mkdir()
    for name in ("pytorch_model.bin", "modeling_chat.py", "config.json"):
        (root / "someone/pickled" / name).write_text("{}")
        if name != "config.json":
            (root / CHAT / name).write_text("never asked for")
    (root / RESNET).mkdir(parents=True)
    save_file(timm.create_model("test_resnet").state_dict(), root / RESNET / "model.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root))
    Thread(target=server.serve_forever, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The hub's client reads its environment once: each call is a process of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"PYTHONPATH": str(REPOSITORY), "CAUSAL_KITCHEN_ROOT": str(REPOSITORY), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], env=env | environment, capture_output=True, text=True)


FETCH = ["-m", "recipe_lib.runner.fetch", REPOSITORY / "params/smoke.yaml"]
USES = {
    "method": "mine",
    "system_file": OWN,
    "descriptions": "true",
    "description_backend": "llm",
    "image_model_args": "[]",
}
USES |= {"description_model": CHAT, "pretrained": "true", "image_model": "test_resnet"}


def settings(**changed: str) -> list:
    return [word for key, value in (USES | changed).items() for word in ("-p", key, value)]


def test_what_was_fetched_is_loaded_without_a_network(hub, tmp_path):
    root, address = hub
    place = tmp_path / "some weights"
    done = python(*FETCH, *settings(), "--to", place, HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    chat, resnet, command = done.stdout.splitlines()
    assert chat.startswith(f"description_model {CHAT}: ") and chat.endswith(f"{place}/models--someone--chat")
    size = (root / RESNET / "model.safetensors").stat().st_size
    assert resnet == f"image_model test_resnet: {size / 1e6:,.1f} MB in {place}/models--{RESNET.replace('/', '--')}"
    assert command.startswith(f"HF_HUB_CACHE='{place}' HF_HUB_OFFLINE=1 ./run_all.sh {FETCH[-1]} -p method mine -p ")
    asked = (root / "asked").read_text().split()
    assert {"model.safetensors", "tokenizer.json"} <= set(asked)
    assert not [name for name in asked if name.endswith((".bin", ".py"))]

    script = f"""if True:
        from pathlib import Path
        import torch
        from safetensors.torch import load_file
        from recipe_lib.data.descriptions import LLMDescriber
        from recipe_lib.encoders.image import ImageEncoder
        backbone = ImageEncoder("test_resnet", 8, pretrained=True).backbone.state_dict()
        published = load_file({str(root / RESNET / "model.safetensors")!r})
        print(all(torch.equal(value, published[key]) for key, value in backbone.items()))
        for model in ({CHAT!r}, {str(root / CHAT)!r}):
            describer = LLMDescriber(model)
            print(describer._batch({RECIPES[:2]!r}))
    """
    done = python("-c", script, HF_HUB_CACHE=str(place), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    same, by_name, by_folder = done.stdout.splitlines()
    assert same == "True" and by_name == by_folder

    again = python(*FETCH, *settings(), "--to", place, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout.splitlines()[:2] == [chat, resnet], again.stderr


UNKNOWN = "the hub has no such model, or shows it to its owners alone (`hf auth login`); is it spelt right?"
ERRORS = {
    "someone/gated": "its publisher wants an account: accept the licence on its page, then `hf auth login`, and again",
    "someone/chatt": UNKNOWN,
    "some one/../chat": UNKNOWN,
    "someone/pickled": "model.safetensors is not in it, and other formats are not read; name another model",
}


def test_what_cannot_be_fetched_is_one_line_and_the_others_are_tried(hub, tmp_path):
    script = "import sys; from recipe_lib.runner.fetch import main; print([main([*sys.argv[2:], '-p', "
    script += "'description_model', name]) for name in sys.argv[1].split(',')])"
    own = [FETCH[-1], *settings(image_model="test_resnet.r160_in1k"), "--to", tmp_path]
    done = python("-c", script, ",".join(ERRORS), *own, HF_ENDPOINT=hub[1])
    expected = [f"error: description_model {name} ({name}): {why}" for name, why in ERRORS.items()]
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == expected, done.stderr
    *others, status = done.stdout.splitlines()
    assert [line.split(":")[0] for line in others] == ["image_model test_resnet.r160_in1k"] * 4
    assert status == "[1, 1, 1, 1]"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "not all of it is here, and HF_HUB_OFFLINE is set; fetch it where there is network"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub does not answer; run this where there is network"),
    ],
)
def test_without_a_network_each_is_named_and_nothing_is_tried_again(tmp_path, environment, why):
    done = python(*FETCH, *settings(), "--to", tmp_path, **environment)
    names = (f"description_model {CHAT} ({CHAT})", f"image_model test_resnet ({RESNET})")
    assert done.stderr.splitlines() == [f"error: {name}: {why}" for name in names]
    assert done.returncode == 1 and not done.stdout
