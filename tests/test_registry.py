"""What is not of this package, by name or import path: methods, models and data of a notebook, equal to ours."""

import sys
import textwrap

import pytest
import torch
from torch import nn

import prunelab
from prunelab import PrunelabError, data, models, pruners
from prunelab.lab.live.offer import offered
from prunelab.masks import Masks
from prunelab.models import mlp
from prunelab.pruners import METHODS, Context, Pruner, Ranking, Step
from prunelab.pruners.units import remove_lowest
from prunelab.registry import Registry
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train, settings
from prunelab.training.comparison import comparable
from prunelab.training.experiment import run_all


@pytest.fixture(autouse=True)
def as_before():
    """What a test registers is forgotten."""
    known = [(r, dict(r._entries), dict(r.registered)) for r in (METHODS, models.MODELS, data.sources.SOURCES)]
    yield
    for registry, entries, registered in known:
        registry._entries, registry.registered = entries, registered


@settings
class LargestGo(Ranking):
    """The largest weights go: a control that should be bad."""

    scope: str = "global"
    allow_empty: bool = False
    power: float = 1.0

    def scores(self, now: Context) -> dict[str, torch.Tensor]:
        parameters = dict(now.model.named_parameters())
        return {name: -(parameters[name].detach().abs() ** self.power) for name in now.masks}


class First(Pruner):
    """The first weight of the first layer goes; it is no dataclass, and becomes one."""

    every: int = 1

    def prune(self, now: Context, amount: float) -> Step:
        name = next(iter(now.masks))
        gone = torch.ones_like(now.masks[name])
        gone.view(-1)[: self.every] = False
        return Step(now.masks & Masks({name: gone}))


def test_a_registered_method_is_one_like_ours(tmp_path):
    prunelab.register("largest_go", LargestGo)
    prunelab.register("first", First, every=2)
    torch.manual_seed(0)
    model = mlp(4, 5, 3)
    masks = prunelab.prune(model, "largest_go", 0.5)
    weights = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if n in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert weights[kept].max() <= weights[~kept].min()
    assert prunelab.prune(model, "first", 0.5).kept == 33
    with pytest.raises(PrunelabError, match="method 'first' itself sets every = 2"):
        prunelab.prune(model, "first", 0.5, every=3)
    with pytest.raises(PrunelabError, match="power"):
        prunelab.prune(model, "largest_go", 0.5, power="much")  # fields are checked as ours are
    assert offered(model, Masks.ones(model))["largest_go"] == ["weight"]
    assert "largest_go" in comparable()
    runs = [
        Run(Data("digits", train_size=100), Model("mlp", (4,)), Train(epochs=1), Prune(method, 0.5, 1), seed=seed)
        for method, seed in (("largest_go", 0), ("largest_go", 1), ("first", 0))
    ]
    results = run_all(runs, store=Store(tmp_path), jobs=1, progress=False)
    assert results.last["density"].round(2).tolist()[:2] == [0.5, 0.5]
    assert not results.failed


def test_a_class_of_a_notebook_reaches_other_processes(tmp_path):
    """What is defined in ``__main__`` is sent along; so it is run as a script."""
    script = tmp_path / "notebook.py"
    script.write_text(
        textwrap.dedent("""
        import prunelab
        from prunelab import Data, Model, Prune, Run, Train
        from prunelab.masks import Masks
        from prunelab.pruners import Pruner, Step

        class Nothing(Pruner):
            share: float = 0.25

            def prune(self, now, amount):
                name = "output.weight"
                mask = now.masks[name].clone()
                mask.view(-1)[: int(self.share * mask.numel())] = False
                return Step(now.masks & Masks({name: mask}))

        if __name__ == "__main__":
            prunelab.register("nothing", Nothing)
            data = Data("digits", train_size=100)
            prune = Prune("nothing", 0.5, 1)
            runs = [Run(data, Model("mlp", (4,)), Train(epochs=1), prune, seed=seed) for seed in (0, 1)]
            results = prunelab.run_all(runs, store="STORE", jobs=2, progress=False)
            print(results, results.last["weights"].tolist())
        """).replace("STORE", str(tmp_path / "store"))
    )
    import subprocess

    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert out.stdout.strip() == "2 runs: 0 loaded, 2 trained [286.0, 286.0]", out.stderr


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mymethods.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        from prunelab.pruners import Context, Pruner, Step
        from prunelab.masks import Masks

        class Half(Pruner):
            def prune(self, now: Context, amount: float) -> Step:
                even = {name: torch.arange(m.numel()).view(m.shape) % 2 == 0 for name, m in now.masks.items()}
                return Step(now.masks & Masks(even))

        class Abstract(Pruner):
            pass

        def wide(input_shape, hidden, classes):
            features = torch.Size(input_shape).numel()
            return nn.Sequential(nn.Flatten(), nn.Linear(features, 6), nn.ReLU(), nn.Linear(6, classes))

        def blobs():
            draw = torch.Generator().manual_seed(0)
            y = torch.arange(90) % 3
            return y[:, None] + 0.1 * torch.randn(90, 2, generator=draw), y

        def odd():
            return torch.zeros(3)

        NUMBER = 3
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "mymethods"
    sys.modules.pop("mymethods", None)


def test_an_import_path_stands_wherever_a_name_does(mine, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    assert prunelab.prune(model, f"{mine}:Half", 0.0).kept == 8
    train = Train(epochs=3, lr=0.05, batch_size=8)
    asked = Run(Data(f"{mine}:blobs", test=15), Model(f"{mine}:wide"), train, Prune(f"{mine}:Half", 0.5, 1))
    assert asked.id.startswith("mymethods_half-mymethods_wide-mymethods_blobs-s0-")
    results = run_all([asked], store=Store(tmp_path / "store"), jobs=1, progress=False)
    assert not results.failed
    assert results.last["density"].item() == 0.5
    assert results.rounds["test_accuracy"].iloc[0] > 0.9


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere:Half", "nowhere cannot be imported"),
        ("mymethods:Hafl", "mymethods has no 'Hafl': did you mean 'Half'?"),
        ("mymethods:NUMBER", "3 is no class that derives from prunelab.Pruner"),
        ("mymethods:Abstract", "'Abstract' is no class that derives from prunelab.Pruner and has its prune"),
        ("my methods:Half", "should be an import path, 'package.module:name'"),
        ("mymethods:Half.prune", "should be an import path"),
        ("half", "there is no pruning method 'half'"),
    ],
)
def test_a_path_that_leads_nowhere_is_told_in_one_line(mine, path, words):
    with pytest.raises(PrunelabError) as caught:
        prunelab.prune(nn.Sequential(nn.Linear(4, 4)), path, 0.5)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_registered_is_told_in_one_line(mine):
    for name, thing, words in (
        ("magnitude", LargestGo, "is one of this package: choose another name"),
        ("Largest go", LargestGo, "should be lower-case letters, digits and _"),
        ("thing", nn.Linear, "'Linear' is no class that derives from prunelab.Pruner"),
    ):
        with pytest.raises(PrunelabError, match=words):
            prunelab.register(name, thing)
    with pytest.raises(PrunelabError, match="LargestGo has no field 'powr'"):
        prunelab.register("largest", LargestGo, powr=1.0)
    with pytest.raises(PrunelabError, match="should be a function"):
        models.register("mine", nn.Linear(2, 2))
    with pytest.raises(PrunelabError, match="odd should give x, y"):
        data.load(f"{mine}:odd")
    with pytest.raises(PrunelabError, match="there is no model 'lenet_6'"):
        models.build(Model("lenet_6"), (1, 28, 28), 10, 0)


def test_a_registry_lists_what_was_registered_and_nothing_that_was_imported(mine):
    known = Registry("thing", {"one": 1}, lambda thing: thing)
    known.register("two", 2)
    known.register("two", 3)
    assert known[f"{mine}:NUMBER"] == 3
    assert (list(known), known.find("two"), known.registered) == (["one", "two"], 3, {"two": (3, {})})


def test_scores_of_ones_own_are_removed_by_the_common_rule():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    now = Context(model, Masks.ones(model))
    kept = remove_lowest(now, {"0.weight": torch.tensor([[1.0, 4.0], [3.0, 2.0]])}, 0.5)
    assert kept["0.weight"].tolist() == [[False, True], [True, False]]
    assert pruners.build(Prune("none")).prune(now, 0.5).masks == now.masks
