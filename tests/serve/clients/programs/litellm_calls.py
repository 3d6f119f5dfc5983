"""LiteLLM: chat, streamed and not, text completion and an image, with the fields it adds of its own."""

import json
import sys

import litellm

litellm.telemetry = False
fields = {"api_base": sys.argv[1], "api_key": "none", "num_retries": 0}
messages = [{"role": "user", "content": "Draw a seven."}, {"role": "assistant", "content": None}]
messages.append({"role": "user", "content": "Which digit is this?"})
text = {"seed": 5, "max_tokens": 12, "extra_body": {"modalities": ["text"]}}
whole = litellm.completion(model="openai/tiny", messages=messages, **text, **fields)
streamed = litellm.completion(model="openai/tiny", messages=messages, stream=True, **text, **fields)
completion = litellm.text_completion(model="text-completion-openai/tiny", prompt="The", max_tokens=6, seed=5, **fields)
image = litellm.image_generation(model="openai/tiny", prompt="a seven", **fields)
try:
    litellm.completion(model="openai/other", messages=messages, **fields)
    error = "none"
except litellm.NotFoundError as found:
    error = str(found)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "usage": whole.usage.total_tokens,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
            "completion": completion.choices[0].text,
            "image": bool(image.data[0].b64_json),
            "error": error,
        }
    )
)
