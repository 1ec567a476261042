"""`kernels` is also a Hugging Face package that transformers probes for: ours and theirs must live side by side."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code, *path, cwd=ROOT):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, path)), "HOME": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_transformers_imports_with_our_folder_first_on_the_path():
    """As under `python -m pytest` or `python -c` in the project's root."""
    done = python("import kernels, transformers; from transformers import MambaConfig, MambaForCausalLM; "
                  "MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1)); print(kernels.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_another_package_named_kernels_does_not_shadow_ours(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = lambda name: 'theirs'\n")
    done = python("import kernels; from serpent_scale.kernels.selective_scan import selective_scan; "
                  "print(kernels.get_kernel('x'), selective_scan.__module__)", tmp_path, cwd=tmp_path)
    assert done.stdout.split() == ["theirs", "serpent_scale.kernels.selective_scan"], done.stderr


def test_asking_our_folder_for_their_names_says_which_package_was_found():
    done = python("from kernels import get_kernel")
    assert done.returncode != 0 and "serpent-scale's kernels/ folder" in done.stderr.splitlines()[-1]


def test_a_copy_of_the_project_without_symbolic_links_says_how_to_mend_it(tmp_path):
    (tmp_path / "serpent_scale").mkdir()
    (tmp_path / "serpent_scale" / "__init__.py").write_text((ROOT / "serpent_scale" / "__init__.py").read_text())
    (tmp_path / "serpent_scale" / "kernels").write_text("../kernels")
    done = python("import serpent_scale.kernels", cwd=tmp_path)
    assert done.returncode != 0 and "ln -sfn ../kernels serpent_scale/kernels" in done.stderr.splitlines()[-1]
