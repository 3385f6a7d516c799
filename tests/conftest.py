import gc
import os


# Spinning threads make tiny models up to ten times slower on a busy machine. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
# No test may reach the network, nor wait for retries of a Hub that is not there. A test that needs a Hub starts its
# own on loopback in a subprocess.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch


torch.set_num_threads(1)


def pytest_collection_finish():
    # Every training collects garbage. What has been imported is none, and need not be searched each time.
    gc.freeze()
