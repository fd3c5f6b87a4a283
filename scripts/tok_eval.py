"""Compare bytes per token on several kinds of text with gpt2 and cl100k, if tiktoken can download them.

python -m scripts.tok_eval configs/laptop.toml
"""

import sys
import sysconfig
from itertools import islice
from pathlib import Path

from gkachat.config import Config, home
from gkachat.data.sources import Corpus
from scripts.cli import parse_config, run

SAMPLE_CHARS = 200_000
ENGLISH = (
    "Not much is known about the harbour before the second lighthouse was built. In 1874 the council asked for "
    "a survey, which found that the channel had moved by forty yards; large ships had to wait for the tide. "
)
GERMAN = (
    "Über die Geschwindigkeit, mit der sich die Nachricht verbreitete, gehen die Berichte auseinander. Sicher ist nur, "
    "dass gegen Abend die ersten Händler ihre Läden schlossen und die Brücke für Fuhrwerke gesperrt wurde. "
)
CHINESE = "河水在夜里涨了三尺，清晨的时候，渡口已经看不见了。老人说，这样的水他一生只见过两次。"
MATHS = "Let $f(x) = \\sum_{n=0}^{\\infty} \\frac{x^n}{n!}$; then $f'(x) = f(x)$, $f(0) = 1$ and $f(1) = 2.718281828$. "
LOG = "2024-03-07T11:42:09.318Z INFO  worker-17 request id=9f83c1 path=/api/v2/items?limit=250 status=200 bytes=18342\n"


def kinds(config: Config) -> dict[str, str]:
    """Return samples by name. The first is from the val split of the config's source."""
    val = "".join(islice((text for split, text in Corpus(config.data) if split == "val"), 50))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    code = "".join((stdlib / name).read_text("utf-8") for name in ("argparse.py", "dataclasses.py", "heapq.py"))
    samples = {
        f"{config.data.name} (val)": val,
        "python code": code,
        "english": ENGLISH,
        "german": GERMAN,
        "chinese": CHINESE,
        "maths": MATHS,
        "server log": LOG,
    }
    return {name: text[:SAMPLE_CHARS] for name, text in samples.items()}


def main() -> None:
    config, _ = parse_config(sys.argv[1:], __doc__)
    import tiktoken

    from gkachat.benchmark import show, table
    from gkachat.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(home() / "tokenizer" / config.data_name)
    encoders = {"ours": tokenizer.encode}
    for name in ("gpt2", "cl100k_base"):
        try:
            encoders[name] = tiktoken.get_encoding(name).encode_ordinary
        except Exception as error:  # a failed download raises many kinds of error, and ours needs none
            print(f"{name}: tiktoken cannot load it here ({type(error).__name__})")
    rows = []
    for kind, text in kinds(config).items():
        rates = {name: f"{len(text.encode()) / len(encode(text)):.2f}" for name, encode in encoders.items()}
        rows.append({"bytes per token": kind} | rates)
    show(table(rows))


if __name__ == "__main__":
    run(main)
