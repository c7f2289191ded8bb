"""Anthropic's own client: the Messages API, `X-Api-Key`."""

import sys

import anthropic
from report import report, wait

url, model, key = sys.argv[1:4]
client = anthropic.Anthropic(base_url=url, api_key=key, timeout=60)
question = {"model": model, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12}

report("ready", version=anthropic.__version__, models=[each.id for each in client.models.list()])
report("model", id=client.models.retrieve(model).id)
answer = client.messages.create(**question)
report("chat", text=answer.content[0].text, id=answer._request_id)
report("count", tokens=client.messages.count_tokens(model=model, messages=question["messages"]).input_tokens)
with client.messages.stream(**question) as stream:
    pieces = list(stream.text_stream)
report("stream", pieces=len(pieces), text="".join(pieces))
beta = client.beta.messages.create(**question)  # asks with ?beta=true
report("beta", text=beta.content[0].text)
for name in ("nobody", "broken"):
    try:
        client.messages.create(**{**question, "model": name})
    except anthropic.APIStatusError as error:
        code = error.body["error"]["code"]
        kind = type(error).__name__
        report("error", kind=kind, status=error.status_code, code=code, says=str(error), id=error.request_id)
with client.messages.create(**{**question, "max_tokens": 4000}, stream=True, extra_body={"ignore_eos": True}) as stream:
    next(iter(stream))
    wait("streaming")
wait("left")
