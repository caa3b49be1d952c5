"""A server in a thread of the tests' process, with a tiny model that has a chat template, and one that has none."""

import contextlib
import dataclasses
import threading

import jax
import openai
import pytest

from lm.data.curriculum import arithmetic_row
from lm.data.tokenizer import SubwordTokenizer
from lm.model.transformer import Transformer
from lm.rollout.slots import sampling_model
from lm.serve.app import State, make_app
from lm.serve.memory import sizes_for
from lm.serve.metrics import Metrics
from lm.serve.models import Served, warm_up
from lm.serve.scheduler import Scheduler
from lm.serve.schema import Tokens
from lm.serve.server import EndingServer, bind
from lm.serve.slot_engine import SlotEngine
from tests.helpers import TINY
from tests.serve.running import Running

LENGTH, NEW = 200, 100


@pytest.fixture(scope="session")
def tokenizer():
    texts = [turn["content"] for index in range(200) for turn in arithmetic_row(index)["messages"]]
    return SubwordTokenizer.train(texts, 320)


@pytest.fixture(scope="session")
def serve(tokenizer):
    """Serve in a thread: `with serve(slots=…, queue=…) as running`."""

    @contextlib.contextmanager
    def serving(slots=4, queue=100, seconds=60.0, token=None, max_len=LENGTH, new=NEW, names=("first",)):
        served, models = {}, {}
        for number, name in enumerate(names):
            config = dataclasses.replace(TINY, max_len=max_len, tied_head=False)  # or it repeats itself
            models[name] = Transformer(config, tokenizer.vocab_size, jax.random.key(3 + number))
            engine = SlotEngine(sampling_model(models[name]), tokenizer, sizes_for(models[name], slots, max_len, new))
            served[name] = Served(name, tokenizer, Tokens(tokenizer), engine, 0)
            warm_up(served[name])
        metrics = Metrics()
        scheduler = Scheduler({name: one.engine for name, one in served.items()}, queue)
        metrics.watch(scheduler)
        listener = bind("localhost", 0)
        port = listener.getsockname()[1]
        server = EndingServer(make_app(State(served, scheduler, metrics, seconds, token, port)), scheduler)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        scheduler.start()
        thread.start()
        client = openai.OpenAI(
            base_url=f"http://localhost:{port}/v1", api_key=token or "none", max_retries=0, timeout=120
        )
        try:
            yield Running(port, client, served, scheduler, models[names[0]])
        finally:
            server.should_exit = True
            thread.join()
            scheduler.stop()
            listener.close()

    return serving


@pytest.fixture(scope="session")
def running(serve):
    with serve(names=("first", "second")) as found:
        yield found
