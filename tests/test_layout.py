"""The listing is the architecture: who may import whom, and what every module owes its reader."""

import ast
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))

LAYERS = (
    (
        "interrupts",
        "sites",
        "lens_rows",
        "memory_limits",
        "module_devices",
        "gradient_scale",
        "token_labels",
        "attention_page",
        "highlight_page",
        "figure_canvas",
        "dimensionality",
    ),
    (
        "module_taps",
        "model_lock",
        "heat_maps",
        "factored_matrix",
        "probe_figures",
        "attention_view",
        "embedding_figures",
        "attribution_figures",
    ),
    (
        "forward_pass",
        "model_shards",
        "refinement_figure",
        "text_highlight",
        "highlight_view",
        "comparison_figures",
        "attention_figures",
        "steering_figure",
        "logit_attribution_figures",
    ),
    (
        "attention_internals",
        "expert_routing",
        "tokenization",
        "figures",
        "pass_positions",
        "attention_correction",
    ),
    (
        "block_trace",
        "block_finding",
        "decoder_check",
        "array_formats",
        "tagged_json",
        "interactive_figures",
    ),
    (
        "structure_probe",
        "array_files",
        "sweep_figures",
    ),
    ("model_architecture",),
    (
        "architecture_check",
        "model_inspection",
        "checkpoints",
        "activation_record",
        "extraction_request",
        "circuit_nodes",
        "trace_result",
        "attention_result",
        "base_run",
        "prompt_pairs",
        "steering_vector",
        "sweep_result",
        "token_attribution",
        "norm_gain",
        "head_circuit_result",
        "comparison_result",
        "layer_attribution_result",
        "attribution_sweep_figures",
    ),
    (
        "model_loader",
        "memory_estimate",
        "record_files",
        "activation_statistics",
        "steering_direction",
        "node_effects",
        "growing_pass",
        "attribution_sweep",
        "patch_binding",
        "attention_projections",
        "embedding_pass",
        "head_writing_result",
        "logit_tail",
        "logit_attribution",
    ),
    (
        "model_check",
        "intervention_handler",
        "probe_result",
        "activation_extraction",
        "lens_metrics",
        "lens_result",
        "tuned_lens",
        "control_vectors",
        "edited_runs",
        "weighted_gradients",
        "embedding_baseline",
        "gradient_record",
        "attention_attribution",
        "head_weights",
        "stream_parts",
    ),
    (
        "generation",
        "probe_plan",
        "logit_lens",
        "embedding_visualization",
        "direction_finding",
        "attention_analysis",
        "path_pass",
        "logit_metrics",
        "gradient_check",
        "head_circuits",
        "logit_split",
    ),
    (
        "visualization",
        "lens_reports",
        "continuations",
        "steering",
        "steering_effects",
        "path_patching",
        "ablation",
        "feature_attribution",
        "attribution_targets",
        "sweep_cells",
        "head_writing",
        "direct_attribution",
    ),
    (
        "steering_sweep",
        "gradient_attribution",
        "patching_sweep",
        "attribution_estimates",
    ),
    (
        "causal_tracing",
        "attribution_patching",
        "layer_attribution",
    ),
    (
        "intervention",
        "activation_rows",
    ),
    (
        "linear_probes",
        "similarity",
        "embedding_geometry",
    ),
    (
        "concept_eraser",
        "model_comparison",
    ),
    (
        "model_analyzer",
        "examples",
    ),
    ("analyzer_demo",),
)
"""A module imports only from rows above its own; two in one row know nothing of each other."""

ROWS = {module: row for row, modules in enumerate(LAYERS) for module in modules}

SLOW_LIBRARIES = {
    "accelerate",
    "captum",
    "matplotlib",
    "pandas",
    "plotly",
    "sklearn",
    "typer",
    "umap",
}

IMPORTED_BY_TRANSFORMERS = {"accelerate"}
"""Where it is installed, `from transformers import PreTrainedModel` imports it, whatever we do."""

TYPER_PROGRAMS = {"analyzer_cli"}
"""They need typer to be a program at all, so they may import it at once."""


def parse(module):
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imported_by(tree):
    """Return the top names of all imports, also those inside functions and `TYPE_CHECKING`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def decorators(node):
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def is_public(node):
    """Whether it is a function or class that a user sees; an overload is documented once."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return not node.name.startswith("_") and "overload" not in decorators(node)


def without_docstring(tree):
    """Return the dotted names of public functions, classes and methods that have no docstring."""
    missing = [] if ast.get_docstring(tree) else ["(the module)"]
    for node in filter(is_public, tree.body):
        members = filter(is_public, node.body) if isinstance(node, ast.ClassDef) else ()
        named = [(node.name, node), *((f"{node.name}.{m.name}", m) for m in members)]
        missing += [name for name, each in named if not ast.get_docstring(each)]
    return missing


def undocumented_errors(tree):
    """Return `function: Error` for what public functions raise and do not mention."""
    missing = []
    for node in filter(is_public, ast.walk(tree)):
        doc = ast.get_docstring(node) or ""
        raises = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise) and each.exc]
        names = {ast.unparse(e.func) for e in raises if isinstance(e, ast.Call)}
        if not isinstance(node, ast.ClassDef):
            missing += [f"{node.name}: {name}" for name in sorted(names) if name not in doc]
    return missing


def is_one_call(function):
    """Whether a body is a docstring and then one call, returned or not."""
    if not ast.get_docstring(function) or len(function.body) != 2:
        return False
    statement = function.body[1]
    return isinstance(statement, ast.Return | ast.Expr) and isinstance(statement.value, ast.Call)


def is_property(function):
    return bool(decorators(function) & {"property", "cached_property"})


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_module_has_a_row():
    assert set(MODULES) == set(ROWS), "enter the new module in LAYERS, and in pyproject.toml"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_rows_above(module):
    above = {name for name, row in ROWS.items() if row < ROWS[module]}
    assert imported_by(parse(module)) & set(MODULES) <= above


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    assert without_docstring(parse(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_name_the_errors_that_they_raise(module):
    """As ruff's DOC501 does, but also where the docstring is one line."""
    assert undocumented_errors(parse(module)) == []


MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "tril_indices", "triu_indices", "zeros", "as_tensor", "asarray",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_every_tensor_is_made_on_a_device_that_is_named(module):
    """Without one it lies wherever the user's ``torch.set_default_device`` says."""
    found = [
        f"{module}.py:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKERS
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert found == [], "say device=, or use module_devices.as_tensor"


def test_the_facade_only_delegates():
    facade = next(
        node
        for node in parse("model_analyzer").body
        if isinstance(node, ast.ClassDef) and node.name == "ModelAnalyzer"
    )
    methods = [node for node in facade.body if is_public(node) and not is_property(node)]
    assert len(methods) > 20
    assert [method.name for method in methods if not is_one_call(method)] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('"""Doc."""; return f(self.x)', True),
        ('"""Doc."""; f(self.x)', True),
        ("return f(self.x)", False),
        ('"""Doc."""; return self.x', False),
        ('"""Doc."""; x = 1; return f(x)', False),
        ('"""Doc."""', False),
    ],
)
def test_what_counts_as_delegating(body, expected):
    assert is_one_call(ast.parse(f"def f(self): {body}").body[0]) is expected


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_importing_the_facade_is_light():
    code = "import sys, model_analyzer; print(*{m.partition('.')[0] for m in sys.modules})"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert SLOW_LIBRARIES & set(done.stdout.split()) <= IMPORTED_BY_TRANSFORMERS


def test_every_module_imports_without_the_slow_libraries():
    """An optional library that is not installed must not stand in the way of the rest."""
    absent = dict.fromkeys(sorted(SLOW_LIBRARIES - IMPORTED_BY_TRANSFORMERS))
    modules = ", ".join(module for module in MODULES if module not in TYPER_PROGRAMS)
    done = run_python(f"import sys; sys.modules.update({absent!r}); import {modules}")
    assert done.returncode == 0, done.stderr


def test_pyproject_lists_every_module():
    assert sorted(project()["tool"]["setuptools"]["py-modules"]) == MODULES


def test_the_slow_libraries_are_the_banned_ones():
    rule = project()["tool"]["ruff"]["lint"]["flake8-tidy-imports"]
    assert set(rule["banned-module-level-imports"]) == SLOW_LIBRARIES


def test_requirements_pin_every_dependency():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins), "an exact version each"
    about = project()["project"]
    asked = itertools.chain(about["dependencies"], *about["optional-dependencies"].values())
    asked = {requirement.partition(">")[0] for requirement in asked}
    assert {pin.partition("==")[0] for pin in pins} == asked
