"""langchain-openai: a conversation whose answers are fed back as LangChain keeps them, streamed, in batches."""

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

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
        }
    )
)
