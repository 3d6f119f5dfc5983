"""langchain-openai: a conversation whose answers are fed back as LangChain keeps them, streamed, in batches; tools."""

import json
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url = sys.argv[1]
chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_retries=0, max_tokens=12, seed=5)
drawing = ChatOpenAI(
    model="tiny", base_url=url, api_key="none", max_retries=0, seed=5, extra_body={"modalities": ["image"]}
)
conversation = [SystemMessage(""), HumanMessage("Draw a seven.")]
image = drawing.invoke(conversation)  # its content is empty, and LangChain keeps no images
conversation += [image, HumanMessage("Which digit is this?")]
answer = chat.invoke(conversation)
conversation += [
    answer,
    AIMessage(""),
    HumanMessage([{"type": "text", "text": "And this?"}, {"type": "text", "text": ""}]),
]
chunks = [chunk.text for chunk in chat.stream(conversation)]
batch = [one.text for one in chat.batch([[HumanMessage("one")], [HumanMessage("two")]])]
completion = OpenAI(model="tiny", base_url=url, api_key="none", max_tokens=6, best_of=1, n=1).invoke("The")
responses = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_retries=0, max_tokens=12, use_responses_api=True)
told = responses.invoke([HumanMessage("one")])


class Digit(BaseModel):
    """Draws a digit."""

    value: Literal[1, 7]


@tool
def now() -> str:
    """The time."""
    return "noon"


tools = {}
for name in "chat", "responses":
    model = ChatOpenAI(
        model="tiny", base_url=url, api_key="none", max_retries=0, max_tokens=300, use_responses_api=name == "responses"
    )
    bound = model.bind_tools([Digit, now], tool_choice="any", strict=True)
    asked = [HumanMessage("Draw.")]
    called = bound.invoke(asked, parallel_tool_calls=False)
    streamed = None
    for chunk in bound.stream(asked, parallel_tool_calls=False):
        streamed = chunk if streamed is None else streamed + chunk
    [call] = called.tool_calls
    after = model.invoke([*asked, called, ToolMessage("seven", tool_call_id=call["id"])])
    tools[name] = {"call": call, "streamed": streamed.tool_calls, "after": after.text}
    if name == "chat":
        tools["structured"] = (
            model.with_structured_output(Digit, method="function_calling", strict=True).invoke("Draw.").value
        )
print(
    json.dumps(
        {
            "image": image.content,
            "answer": answer.text,
            "usage": answer.usage_metadata["total_tokens"],
            "again": chat.invoke(conversation[:4]).text,
            "whole": chat.invoke(conversation).text,
            "streamed": "".join(chunks),
            "batch": batch,
            "completion": completion,
            "responses": told.text,
            "tools": tools,
        }
    )
)
