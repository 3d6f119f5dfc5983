"""What can be asked and measured: a model of ours on the cluster's engines, or any OpenAI-compatible endpoint.

    with open_system(SystemSpecification(url="http://127.0.0.1:8000/v1"), Resources(), Tracking()) as system:
        answers = system.answer([Prompt(Document((Text("Draw a seven.", "user"),)), Sampling(mode="interleaved"))])

Start reading at `prompts`.
"""
