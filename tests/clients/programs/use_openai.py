"""OpenAI's own client, whichever major is installed."""

import sys

import openai
from report import report, wait

url, model, key = sys.argv[1:4]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=60)
question = {"model": model, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12}

report("ready", version=openai.__version__, models=[each.id for each in client.models.list()])
report("model", id=client.models.retrieve(model).id)
answer = client.chat.completions.with_raw_response.create(**question)
report("chat", text=answer.parse().choices[0].message.content, id=answer.request_id)
chunks = list(client.chat.completions.create(**question, stream=True))
report("stream", pieces=len(chunks), text="".join(each.choices[0].delta.content or "" for each in chunks))
spoken = client.responses.create(model=model, input="Name a colour.", max_output_tokens=12)
report("responses", text=spoken.output_text)
for name in ("nobody", "broken"):
    try:
        client.chat.completions.create(**{**question, "model": name})
    except openai.APIStatusError as error:
        kind = type(error).__name__
        report("error", kind=kind, status=error.status_code, code=error.code, says=str(error), id=error.request_id)
with client.chat.completions.create(
    **{**question, "max_tokens": 4000}, stream=True, extra_body={"ignore_eos": True}
) as stream:
    next(iter(stream))
    wait("streaming")
wait("left")
