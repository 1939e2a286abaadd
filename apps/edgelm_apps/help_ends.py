"""The end of each command's help: examples, exit codes, environment variables. Data only; docs/cli.md says more."""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "another error",
    2: "an option or its value is wrong",
    3: "the model was not found or could not be fetched",
    4: "the file is not a model that can be read",
    5: "edgelm cannot run the model",
    6: "the budget is too small",
    7: "the backend is not available here",
    8: "the prompt does not fit into the context",
    9: "the chat template fails",
    10: "the weights could not be prepared",
    11: "a backend lies outside its tolerance",
    130: "interrupted",
}
VARIABLES = {
    "EDGELM_CACHE": "folder of models and of what is made of them",
    "EDGELM_PREPARED_LIMIT": "most that prepared files may take",
    "EDGELM_PREFIX_LIMIT": "most that kept system messages may take",
    "EDGELM_RECHECK": "1 tries backends anew",
    "EDGELM_GGML": "folder of ggml's libraries",
    "EDGELM_NPU": "an execution provider of ONNX Runtime in place of the simulated NPU",
    "EDGELM_API_KEY": "what clients must send",
    "HF_HUB_OFFLINE": "1 asks no hub",
    "HF_TOKEN": "for models of a hub that need one",
    "NO_COLOR": "no colours",
}
_FILE = (0, 2, 3, 4, 5)
_LOAD = (*_FILE, 6, 7, 10)
_ANSWER = (0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130)
_ENGINE = ("EDGELM_CACHE", "EDGELM_PREPARED_LIMIT", "EDGELM_GGML", "EDGELM_NPU")
_HUB = ("EDGELM_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN")

ENDS: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]] = {
    "chat": (
        ("edgelm chat", "edgelm chat model.gguf --memory 300MB --system 'Be brief.'"),
        _ANSWER, (*_ENGINE, "EDGELM_PREFIX_LIMIT", "NO_COLOR"),
    ),
    "run": (
        (
            "edgelm run smollm2-135m-instruct 'What is a compiler?' --memory 150MB",
            "cat notes.txt | edgelm run model.gguf 'Summarise this:' --json",
            "edgelm run model.gguf 'A dog' --json-schema dog.json --max-tokens 100",
        ),
        _ANSWER, (*_ENGINE, "EDGELM_PREFIX_LIMIT", "NO_COLOR"),
    ),
    "serve": (
        ("edgelm serve smollm2-135m-instruct --memory 150MB", "edgelm serve chat.gguf embed.gguf --port 9000"),
        (*_LOAD, 130), ("EDGELM_API_KEY", *_ENGINE),
    ),
    "plan": (("edgelm plan gemma-3-270m --memory 150MB",), _LOAD, _ENGINE),
    "profile": (("edgelm profile model.gguf", "edgelm profile model.gguf --json figures.json"), (*_LOAD, 130), _ENGINE),
    "bench": (
        ("edgelm bench model.gguf", "edgelm bench model.gguf --memory 110MB,200MB --against llama.cpp"),
        (*_LOAD, 130), _ENGINE,
    ),
    "verify": (("edgelm verify model.gguf", "edgelm verify model.gguf --backend onnx"), (*_LOAD, 11, 130), _ENGINE),
    "score": (("edgelm score model.gguf 'The cat sat on the mat.'",), (*_LOAD, 8), _ENGINE),
    "embed": (
        ("edgelm embed all-minilm.gguf 'the cat' 'the dog'", "edgelm embed all-minilm.gguf < lines.txt"),
        (*_LOAD, 8), _ENGINE,
    ),
    "pull": (("edgelm pull smollm2-135m-instruct", "edgelm pull org/repo:Q4_K_M"), (0, 2, 3, 130), _HUB),
    "list": (("edgelm list", "edgelm list --json"), (0, 2), ("EDGELM_CACHE",)),
    "show": (("edgelm show model.gguf", "edgelm show smollm2-135m-instruct --json"), _FILE, ("EDGELM_CACHE",)),
    "pack": (("edgelm pack model.gguf", "edgelm pack model.gguf model.pack.gguf"), (*_FILE, 1), ("EDGELM_CACHE",)),
    "draft": (("edgelm draft model.gguf", "edgelm run model.gguf 'Hi' --draft auto"), _LOAD, ("EDGELM_CACHE",)),
    "rm": (("edgelm rm gemma-3-270m", "edgelm rm --prepared"), (0, 2, 3), ("EDGELM_CACHE",)),
    "backends": (("edgelm backends", "edgelm backends model.gguf --memory 200MB"), _LOAD, (*_ENGINE, "EDGELM_RECHECK")),
    "doctor": (("edgelm doctor", "edgelm doctor --recheck"), (0, 2), (*_ENGINE, "EDGELM_RECHECK")),
    "pi": (
        ("edgelm pi demo", "edgelm pi demo --simulate pi5-nvme", "edgelm pi expect gemma-3-270m"),
        (*_ANSWER, 1), (*_ENGINE, "HF_HUB_OFFLINE", "HF_TOKEN"),
    ),
    "completion": (
        (
            "eval \"$(edgelm completion bash)\"    # in ~/.bashrc",
            "eval \"$(edgelm completion zsh)\"     # in ~/.zshrc, after compinit",
            "edgelm completion fish | source     # in ~/.config/fish/config.fish",
        ),
        (0, 2), (),
    ),
}  # fmt: skip


def end_of(name: str) -> str:
    """Return the end of a command's help, as click wraps it."""
    examples, codes, variables = ENDS[name]
    told = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)
    told += "\n\nExit codes: " + "; ".join(f"{code} {EXIT_CODES[code]}" for code in sorted(codes)) + "."
    if variables:
        told += "\n\nEnvironment: " + "; ".join(f"{one}, {VARIABLES[one]}" for one in variables) + "."
    return told
