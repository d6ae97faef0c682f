"""Hostile configs, names, pictures and models given to every command: one sentence, or it works, and nothing else happens.

Each case has a folder of its own. The command may write to its output there, and is watched: `watched.py`.
"""

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
from io import BytesIO
from pathlib import Path

import pipelines
import pytest
import watched
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

LONG = "x" * 300
NAMES = st.sampled_from([
    "../victim", "../../victim", "given/../../victim", "/proc/self/environ", "~nosuchuser/x", "~", "a\0b", "a\nb: c", "\x1b[2J\x1b]0;x\x07",
    LONG, "x/" * 3000, "[bold]x[/]", "[/]", "[link=file:///x]y", "<script>alert(1)</script>", "\u202egnp.x", "\udcff", "\ud800", "-rf", "--help",
    "$(touch victim/x)", "`id`", "%s%n%x", "", " ", ".", "..", "C:\\x", "file:///etc/passwd", "http://127.0.0.1/x", "nonesuch/model", "nonesuch:run",
    "os.system", "a.png", "\u00e9\u0301", "😀", "\u0085\u2028x", "\x7f\x9b31m", "__class__", "{0.__class__}", "data", "out", "link",
]) | st.text(max_size=12)  # fmt: skip
HUGE = st.sampled_from([0, -1, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400, -(10**400), 1e308, -1e-320, float("nan"), float("inf"), -0.0])  # fmt: skip
VALUES = st.recursive(
    NAMES | HUGE | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
RAW = st.sampled_from([
    b"[" * 300_000, b'{"step": 1}\n\xff\n', b'{"step": 1e400}\n',
    b"", b"\0", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"a = " + b"[" * 100_000, b"a." * 50_000 + b"b = 1", b"9" * 5000, b'"\xff"',
    b"x = 0x" + b"f" * 9000, b"!!python/object/apply:os.system ['touch victim/x']", b"cos\nsystem\n(S'touch victim/x'\ntR.", b"{" + b'"a": 1,' * 1000 + b'"a": 1}',
    b"&a [*a, *a]", b"\x80\x04\x95\x1c\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x01x\x94\x85\x94R\x94.", b"null", b"3", b"[]", b"{}", b'"x"',
]) | st.binary(max_size=40)  # fmt: skip


@functools.cache
def stock():
    """A folder with a tiny model, a few pictures and a run of a step, which cases are made of."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    pipelines.write("ddpm", root / "model")
    pipelines.write("sd", root / "text")
    pipelines.pictures(root / "data", 8)
    (root / "run.json").write_text(json.dumps(config()))
    ended = watched.run(["train", "run.json"], root, watch=False)
    assert ended["code"] == 0, ended
    return root


def config(**more):
    """A config of `train`, whose run ends after a step."""
    training = {"steps": 1, "batch": 1, "resolution": 8, "warmup": 0}
    return {"model": "model", "data": "data", "out": "out", "training": training} | more


def png(size=(8, 8), **more):
    buffer = BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG", **more)
    return buffer.getvalue()


def claimed(width, height, kind=b"IHDR"):
    """A PNG that says that it is of this size, and holds nothing."""
    import zlib

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(kind, head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch victim/x) (w) file closefile\nshowpage\n%%EOF\n"
PICTURES = st.sampled_from([
    png(), png()[:60], EPS, claimed(2**31 - 1, 2**31 - 1), claimed(30_000, 30_000), claimed(0, 0), claimed(9, 9, b"IEND"), b"GIF89a" + b"\xff" * 40,
    b"BM" + b"\xff" * 60, b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff", b"\xff\xd8\xff\xe1\xff\xffExif\0\0II*\0" + b"\xff" * 40, b"8BPS" + b"\xff" * 40,
    b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", b"II*\0\x08\0\0\0" + b"\xff" * 40, b"%PDF-1.4", b"\x1f\x8b" + b"\0" * 20, b"PK\x03\x04" + b"\0" * 30,
]) | RAW  # fmt: skip
FILES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(
    ["a\nb", "\x1b[2Jx", "[/]", "<img src=x>", "..x", "-rf", "\udcff", "x" * 240, "$(id)", "*", " ", "\x9b31m", "a'b\"c", "\u202e"]
)  # fmt: skip
LINKS = st.sampled_from(
    [
        "../victim",
        "../victim/secret.txt",
        "../victim/none",
        "/",
        "/dev/zero",
        "/dev/stdin",
        ".",
        "loop.png",
        "../given/a.png",
    ]
)


def tensors(**rows):
    """A safetensors file whose header says this."""
    return header(json.dumps(rows).encode())


def header(body, size=None, data=b"\0" * 64):
    return struct.pack("<Q", len(body) if size is None else size) + body + data


def row(dtype="F32", shape=(4,), at=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


WEIGHTS = st.sampled_from([
    header(b"{}", 2**63), header(b"{}", 2**64 - 1), header(b"{}", 10**8 - 1), header(b"[" * 10_000), header(b""), header(b"{}"), header(b'{"a": NaN}'), header(b"\xff\xfe"),
    tensors(a=row(), b=row(at=(8, 24))), tensors(a=row(shape=(2**60,), at=(0, 64))), tensors(a=row(shape=(2**60,), at=(0, 2**62))), tensors(a=row("I64")), tensors(a=row("Q9")),
    tensors(a=row(shape=(-1,))), tensors(a=row(at=(16, 0))), tensors(a=row(at=(48, 64))), tensors(**{"conv_in.weight": row()}), tensors(**{"conv_in.bias": row("BOOL", (8,), (0, 8))}),
    tensors(**{"conv_in.bias": row("F64", (8,), (0, 64))}), tensors(**{"conv_in.bias": row("F32", (2**31, 2**31, 4), (0, 64))}), tensors(__metadata__={"format": "pt", "x": "y"}),
    tensors(__metadata__={"format": "np"}), tensors(__metadata__={"format": 3}), tensors(**{"__class__.__init__": row(), LONG: row(at=(16, 32))}),
]) | RAW  # fmt: skip


class Case:
    """A folder with what is given (given/), what nobody may touch (victim/), and a command line."""

    def __init__(self, root):
        self.root = root
        (root / "given").mkdir()
        (root / "victim").mkdir()
        (root / "victim/secret.txt").write_text("years of work")
        (root / "temporary").mkdir()
        self.out = root / "given/out"

    def put(self, name, content):
        """Write a file if there can be one of that name."""
        path = os.path.join(self.root, "given", name)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        except (OSError, ValueError):
            return

    def link(self, name, target):
        path = self.root / "given" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            path.unlink()
        if not path.exists() and not path.is_symlink():
            path.symlink_to(target)

    def take(self, name):
        shutil.copytree(stock() / name, self.root / "given" / name, dirs_exist_ok=True)

    def go_on(self):
        """Take the run of `stock`, and write the config of a longer one."""
        self.take("out")
        more = config()["training"] | {"steps": 2}
        (self.root / "given/more.json").write_text(json.dumps(config(training=more)))

    def outputs(self):
        """Where the command may write: its output, and what stands for it while it is made."""
        twins = [self.out.with_name(f".{self.out.name}.{end}") for end in ("tmp", "old", "lock")]
        return [self.out, *twins, self.root / "temporary"]

    def expect(self, arguments):
        """Take a new name in `--out=` for the output: it is where the user wants it."""
        for name in (word.removeprefix("--out=") for word in arguments if word.startswith("--out=")):
            place = self.root / "given" / name.partition("/")[0]
            if not os.path.lexists(place):
                self.out = place

    def look(self):
        """Everything outside of the outputs, with what would show that it was touched."""
        kept = self.outputs()
        found = {}
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if Path(folder, name) not in kept]
            for name in (*folders, *files):
                path = Path(folder, name)
                stat = path.lstat()
                times = 0 if path.is_dir() and path == self.root / "given" else stat.st_mtime_ns
                found[str(path)] = (
                    stat.st_mode,
                    stat.st_size if times else 0,
                    times,
                    os.readlink(path) if path.is_symlink() else "",
                )
        return found

    def judge(self, arguments, **more):
        """Run a command line. It works, or it ends in one sentence; nothing else happens."""
        before = self.look()
        done = watched.run(
            arguments, self.root / "given", self.outputs(), temporary=str(self.root / "temporary"), **more
        )
        said = f"{arguments}: {done['code']} {done['raised']}\n{done['out'][-500:]}\n{done['err'][-1500:]}"
        assert done["found"] == [], f"{done['found']} in {said}"
        assert self.look() == before, said
        assert done["code"] in (0, 2), said
        assert not done["raised"], said
        assert "Traceback" not in done["out"] + done["err"], said
        # a bar of diffusers within a bar goes up a line again
        strange = [c for c in (done["out"] + done["err"]).replace("\x1b[A", "") if not (c.isprintable() or c in "\n\r")]
        assert not strange, f"{strange[:5]} in {said}"
        if done["code"] == 2:
            errors = [line for line in done["err"].splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 or "Usage: " in done["err"], said
        return done


# --- the cases --------------------------------------------------------------------------------------------------------

KEYS = [
    "model", "data", "out", "training", "objective", "training.steps", "training.batch", "training.lr", "training.seed", "training.precision", "training.resolution",
    "training.lora_rank", "training.workers", "training.ema", "objective.layers", "objective.t_range", "objective.micro_batch", "objective.distance", "objective.teacher",
    "objective.mse_weight", "objective.t_prime", "__class__", "training.__class__",
]  # fmt: skip


@st.composite
def configs(draw):
    """`train --dry-run` with a config in which some keys are others: (files, arguments)."""
    form = draw(st.sampled_from(["json", "toml", "raw"]))
    if form == "raw":
        name = draw(st.sampled_from(["run.json", "run.toml", "run.yaml", "run.json.toml"]))
        return {name: draw(RAW)}, ["train", name, "--dry-run"]
    rows = [
        ("model", "model"),
        ("data", "data"),
        ("out", "out"),
        ("training.steps", 1),
        ("training.batch", 1),
        ("training.resolution", 8),
    ]
    rows = [r for r in rows if draw(st.integers(0, 30))]
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(KEYS) | NAMES)
        if draw(st.booleans()):
            rows = [r for r in rows if r[0] != key]
        rows.append((key, draw(VALUES)))
    text = as_json(rows) if form == "json" else as_toml(rows)
    return {f"run.{form}": text}, ["train", f"run.{form}", "--dry-run"]


def sections(rows):
    found = {"": []}
    for key, value in rows:
        section, _, name = key.rpartition(".") if key.count(".") == 1 else ("", "", key)
        found.setdefault(section, []).append((name, value))
    return found


def as_json(rows):
    found = sections(rows)
    members = [(name, json.dumps(value)) for name, value in found.pop("")]
    members += [
        (name, "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in part) + "}")
        for name, part in found.items()
    ]
    return ("{" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in members) + "}").encode()


def as_toml(rows):
    def write(value):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) and value > 2**64:
            return hex(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {write(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        return repr(value) if isinstance(value, int | float) else json.dumps(value)

    found = sections(rows)
    lines = [f"{json.dumps(name)} = {write(value)}" for name, value in found.pop("")]
    for section, part in found.items():
        lines += [f"[{json.dumps(section)}]", *(f"{json.dumps(name)} = {write(value)}" for name, value in part)]
    return "\n".join(lines).encode()


@st.composite
def models(draw, whole):
    """A command on a model one file of which is another; `whole`: also the commands that take seconds."""
    part = draw(
        st.sampled_from(["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "weights", "raw"])
    )
    files = {}
    if part == "weights":
        files["model/unet/diffusion_pytorch_model.safetensors"] = draw(WEIGHTS)
    elif part == "raw":
        files[
            "model/"
            + draw(st.sampled_from(["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]))
        ] = draw(RAW)
    else:
        content = json.loads((stock() / "model" / part).read_text())
        words = st.sampled_from(
            [
                "UNet2DModel",
                "os.system",
                "hostile",
                "hostile_module.Hostile",
                "../hostile.py",
                "DDPMPipeline",
                "StableDiffusionPipeline",
                "FluxPipeline",
                "AutoencoderKL",
            ]
        )
        pairs = st.tuples(
            st.sampled_from(["diffusers", "transformers", "os", "hostile", "hostile_module", ".."]), words
        ).map(list)
        for _ in range(draw(st.integers(1, 2))):
            key = draw(
                st.sampled_from(
                    [
                        *content,
                        "_class_name",
                        "_name_or_path",
                        "auto_map",
                        "custom_pipeline",
                        "_module",
                        "quantization_config",
                        "torch_dtype",
                        "dtype",
                    ]
                )
                | NAMES
            )
            content[key] = draw(VALUES | words | pairs)
        files["model/" + part] = json.dumps(content).encode()
    if draw(st.booleans()):
        files["model/unet/diffusion_pytorch_model.bin"] = files["model/unet/hostile_module.py"] = (
            b"open('victim/x', 'w')\n"
        )
        files["model/hostile_module.py"] = files["model/pipeline.py"] = b"open('victim/x', 'w')\n"
    some = [["sample", "model", "--out", "out", "--n", "1", "--steps", "1"]]
    slower = [
        ["inspect", "model"], ["inspect", "model/unet", "--json"], ["train", "run.json", "--dry-run"], ["evaluate", "model", "data", "--steps", "1", "--batch", "8"],
    ]  # fmt: skip
    command = draw(st.sampled_from(some * 4 + slower if whole else some))
    return files, command


@st.composite
def data(draw, whole):
    """`evaluate` or `demo` on a folder with hostile files."""
    files = {}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(FILES) + draw(st.sampled_from([".png", ".jpg", ".gif", ".webp", ".bmp", "/x.png"]))
        files["data/" + name] = draw(PICTURES | LINKS)
    if draw(st.booleans()):
        about = st.dictionaries(st.sampled_from(["file_name", "text", "file", "seed"]), VALUES, min_size=1)
        which = draw(st.sampled_from(["samples.json", "metadata.jsonl", "metadata.csv"]))
        files["data/" + which] = draw(
            RAW
            | LINKS
            | st.builds(lambda rows: json.dumps({"pictures": rows}).encode(), st.lists(about, max_size=3) | VALUES)
        )
    demo = [
        "demo",
        "--resume",
        "--dataset",
        "data",
        "--out",
        "out",
    ]  # there is nothing to resume, which is found after the data are read
    slower = [["evaluate", "data", "data"], ["evaluate", "data", "data", "--json", "--train", "data"]]
    command = draw(st.sampled_from([demo] * 3 + slower if whole else [demo]))
    return files, command


TABLES = st.one_of(
    RAW,
    st.lists(
        st.dictionaries(st.sampled_from(["file_name", "text", "\0", "__class__"]), NAMES | VALUES),
        min_size=1,
        max_size=3,
    ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=3).map(
        lambda rows: ("file_name,text\n" + "\n".join(f"{a},{b}" for a, b in rows)).encode("utf-8", "surrogatepass")
    ),
)
PLANTS = [
    "state/latest.safetensors", "state", "model", "samples", "log.jsonl", "config.json", ".config.json.tmp", "samples/.before.png.tmp", "tensorboard", "samples.json", "state/run.json",
    "state/.run.json.tmp", "state/.latest.safetensors.tmp", "grid.png",
]  # fmt: skip


def meant(one, other):
    """What the package itself would have written, but for two values."""
    mark = {"made by": "perceptual-diffusion train", "saved": one, "finished": other, "step": one}
    return (json.dumps(mark) + "\n").encode("utf-8", "surrogatepass")


@st.composite
def outs(draw):
    """A command on an output folder that somebody has prepared, or on a run that is whole but for a file."""
    if draw(st.booleans()):
        names = st.sampled_from(["log.jsonl", "config.json", "state/latest.safetensors", "samples/before.png", "model"])
        planted = {"out/" + draw(names): draw(RAW | WEIGHTS | st.builds(meant, VALUES, VALUES))}
        return planted, ["train", "more.json", "--resume"]
    files = {}
    for _ in range(draw(st.integers(1, 3))):
        files["out/" + draw(st.sampled_from(PLANTS))] = draw(LINKS | RAW | WEIGHTS)
    made = draw(st.sampled_from(["train", "sample", "demo"]))
    mark = {"made by": f"perceptual-diffusion {made}", "pictures": draw(st.just([]) | VALUES)}
    files["out/" + {"train": "config.json", "sample": "samples.json", "demo": "metrics.json"}[made]] = json.dumps(
        mark
    ).encode()
    command = draw(st.sampled_from([
        ["train", "run.json"], ["train", "run.json", "--resume"], ["sample", "model", "--out", "out", "--n", "1", "--steps", "1", "--overwrite"],
        ["demo", "--out", "out", "--resume", "--dataset", "digits"], ["sample", "model", "--out", "out"],
    ]))  # fmt: skip
    return files, command


OPTIONS = {
    "sample": ["--out", "--prompt", "--prompts", "--class", "--device", "--precision", "--lora", "--compare", "--size", "--steps", "--guidance", "--rescale", "--seed", "--n", "--batch"],
    "evaluate": ["--network", "--weights", "--resolution", "--train", "--samples", "--device", "--seed", "--prompts", "--lora"],
    "inspect": ["--layers", "--size", "--batch", "--inputs", "--prediction"],
    "demo": ["--out", "--dataset", "--device", "--steps", "--samples", "--seed"],
    "train": [],
}  # fmt: skip


@st.composite
def arguments(draw):
    """A command line with one hostile argument."""
    command = draw(st.sampled_from(list(OPTIONS)))
    text = draw(NAMES | HUGE.map(str)).replace("\0", "")
    base = {
        "sample": ["sample", "model", "--out", "out", "--n", "1", "--steps", "1"], "evaluate": ["evaluate", "data", "data"], "inspect": ["inspect", "model"],
        "demo": ["demo", "--resume", "--out", "out"], "train": ["train", "run.json", "--dry-run"],
    }[command]  # fmt: skip
    place = draw(st.integers(0, 2)) if command != "demo" else 1
    if place and OPTIONS[command]:
        return {}, [*base, f"{draw(st.sampled_from(OPTIONS[command]))}={text}"]
    if command == "demo":
        return {}, [*base, text]
    return {}, [base[0], *base[2:], "--", text, *(["data"] if command == "evaluate" else [])]


@st.composite
def captions(draw):
    """Captions that `train` reads."""
    name = draw(st.sampled_from(["metadata.jsonl", "metadata.csv", "0.txt", "*.txt"]))
    files = {f"data/{name}": draw(TABLES | LINKS)}
    if "metadata" not in name:
        files["data/metadata.jsonl"] = None
    return files, ["train", "text.json", "--dry-run"]


def kinds(whole):
    return {
        "configs": configs(), "models": models(whole), "data": data(whole), "outs": outs(), "arguments": arguments(), "captions": captions(),
    }  # fmt: skip


KINDS = kinds(True)


def try_out(files, command):
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        case.take("data")
        if (
            "model" in command
            or "run.json" in command
            or "train" in command
            or any(name.startswith("model/") for name in files)
        ):
            case.take("model")
        (case.root / "given/run.json").write_text(json.dumps(config()))
        if "text.json" in command:
            case.link("text", stock() / "text")
            (case.root / "given/text.json").write_text(json.dumps(config(model="text")))
        if "more.json" in command:
            case.go_on()
        for name, content in files.items():
            if content is None:
                (case.root / "given" / name).unlink()
            elif isinstance(content, bytes):
                case.put(name, content)
            else:
                case.link(name, content)
        case.expect(command)
        case.judge(command)


quick = settings(
    max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(("kind", "cases"), kinds(False).items())
def test_what_is_hostile_ends_in_one_sentence_and_touches_nothing_else(kind, cases):
    quick(given(cases)(lambda made: try_out(*made)))()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cases"), kinds(True).items())
def test_a_thousand_hostile_cases_end_in_one_sentence_and_touch_nothing_else(kind, cases):
    settings(quick, max_examples=170)(given(cases)(lambda made: try_out(*made)))()
