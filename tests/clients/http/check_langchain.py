"""LangChain's chat model."""

from __future__ import annotations

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from .served import KEY, MODEL

TALK = [SystemMessage("be brief"), HumanMessage("tell me a story")]


@pytest.fixture
def how(served):
    return {"model": MODEL, "base_url": served.base_url, "api_key": KEY, "max_retries": 0}


def test_invoke_stream_and_batch(how):
    chat = ChatOpenAI(**how, max_completion_tokens=15)
    whole = chat.invoke(TALK)
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata["output_tokens"] <= 15
    total = None
    for chunk in chat.stream(TALK, stream_usage=True):
        total = chunk if total is None else total + chunk
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    many = chat.batch([[HumanMessage(f"{i}")] for i in range(8)])
    assert len({message.content for message in many}) == 8


def test_a_conversation_finds_its_beginning_in_the_cache(how):
    chat = ChatOpenAI(**how, max_completion_tokens=40)
    talk = [HumanMessage("tell me about the sea " * 60)]
    talk.append(chat.invoke(talk))
    talk.append(HumanMessage("and the shore"))
    again = chat.invoke(talk)
    assert again.usage_metadata["input_token_details"]["cache_read"] > 200


def test_asynchronous_streams(how):
    async def test():
        chat = ChatOpenAI(**how, max_completion_tokens=10)

        async def one(i):
            return "".join([c.content async for c in chat.astream([HumanMessage(f"{i}")])])

        assert all(await asyncio.gather(*map(one, range(10))))

    asyncio.run(test())


def test_the_model_for_completions(how):
    said = OpenAI(**how, max_tokens=8)
    assert said.invoke("once upon") == "".join(said.stream("once upon"))
