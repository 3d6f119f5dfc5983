"""Human studies: people judge the answers of systems that they cannot tell apart (the paper's human evaluation and its
safety test).

A study is a folder: `create` puts the systems' answers to all prompts there, as documents. Judgements are in a database
(`store`), which the page of `serve/study` fills; `statistics` and `report` say what they amount to, and `exchange`
takes them to other tools and back.
"""
