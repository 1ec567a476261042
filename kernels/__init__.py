"""Numerical kernels, one folder per operation: a readable reference beside its accelerated form.
Import as `serpent_scale.kernels`; the plain name `kernels` belongs to a Hugging Face package."""

# transformers probes for a package named `kernels` and asks its version; with this folder first on sys.path it finds ours,
# reads a version too old to use, and goes on without.
__version__ = "0.0.0"

if __name__ == "kernels":

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"kernels.{name}: this is serpent-scale's kernels/ folder ({__path__[0]}), found because its parent is on "
            f"sys.path; for ours write `serpent_scale.kernels`, for Hugging Face's package take that parent off sys.path"
        )
