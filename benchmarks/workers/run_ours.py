"""Our engine under test, in process. Usage: run_ours.py MODEL.gguf"""

import sys
from pathlib import Path

from hob.config import load_config
from hob.lab.speed import SpeedTest
from hob.models.pack import ensure_packed
from protocol import serve

config, _ = load_config()
serve(SpeedTest(ensure_packed(Path(sys.argv[1])), config.engine).sample)
