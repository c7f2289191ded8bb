"""LlamaIndex's client for programs that speak OpenAI's API."""

import gc
import sys

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from report import report, wait

url, model, key = sys.argv[1:4]
ask = [ChatMessage(role="user", content="Name a colour.")]


def chat(name: str, **more: object) -> OpenAILike:
    options = {"max_tokens": 12, "timeout": 60, "is_chat_model": True, **more}
    return OpenAILike(api_base=f"{url}/v1", api_key=key, model=name, **options)


report("ready")
report("chat", text=chat(model).chat(ask).message.content, id=None)
pieces = [each.delta or "" for each in chat(model).stream_chat(ask)]
report("stream", pieces=len(pieces), text="".join(pieces))
for name in ("nobody", "broken"):
    try:
        chat(name).chat(ask)
    except openai.APIStatusError as error:
        kind = type(error).__name__
        report("error", kind=kind, status=error.status_code, code=error.code, says=str(error), id=error.request_id)
stream = chat(model, max_tokens=4000, additional_kwargs={"extra_body": {"ignore_eos": True}}).stream_chat(ask)
next(stream)
wait("streaming")
stream.close()
del stream
gc.collect()  # it does not close the connection itself
wait("left")
