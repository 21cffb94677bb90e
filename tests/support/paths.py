"""Where the tests' data is."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
SUPPORT = Path(__file__).parent
GOLDEN = TESTS / "golden"
CONVERTER = TESTS / "converter"
QUANTIZED = TESTS / "quantized"
TOOLS = TESTS.parent / "tools"
