"""LangChain's client for OpenAI's API."""

import sys

import openai
from langchain_openai import ChatOpenAI
from report import report, wait

url, model, key = sys.argv[1:4]


def chat(name: str, **more: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=name, **{"max_tokens": 12, "timeout": 60, **more})


report("ready")
answer = chat(model).invoke("Name a colour.")
report("chat", text=answer.content, id=None)
pieces = [each.content for each in chat(model).stream("Name a colour.")]
report("stream", pieces=len(pieces), text="".join(pieces))
for name in ("nobody", "broken"):
    try:
        chat(name).invoke("Name a colour.")
    except openai.APIStatusError as error:
        kind = type(error).__name__
        report("error", kind=kind, status=error.status_code, code=error.code, says=str(error), id=error.request_id)
stream = chat(model, max_tokens=4000, extra_body={"ignore_eos": True}).stream("Name a colour.")
next(stream)
wait("streaming")
stream.close()
wait("left")
