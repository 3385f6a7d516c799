"""What tests of rewards share: cases, judges that answer by a rule, and stand-ins for the files of other authors."""

from hp_edit_trl.judges import Judgement
from tests.helpers import photo


def call(reward, count=1, **columns):
    """Calls a reward with edits of one size, and returns the rewards, metrics and extra columns."""
    metrics, extra = {}, {}
    images = [photo(32, 32, i) for i in range(count)]
    arguments = {"prompts": ["Add a cat"] * count, "completions": images, "image": [photo(32, 32, 99)] * count}
    rewards = reward(
        **(arguments | columns), log_metric=metrics.__setitem__, log_extra=extra.__setitem__, trainer_state=None
    )
    return rewards, metrics, extra


class AnswersJudge:
    """Gives the score that a function of the conversation returns, and keeps what it was shown."""

    def __init__(self, rule):
        self.rule = rule
        self.seen = []
        self.loaded = 0

    @property
    def identity(self):
        return {"judge": "AnswersJudge"}

    def load(self, num_images=2):
        self.loaded = num_images

    def __call__(self, conversations):
        self.seen += conversations
        judgements = []
        for conversation in conversations:
            answer = self.rule(conversation)
            if isinstance(answer, str):
                judgements.append(Judgement(None, answer))
            elif answer is None:
                judgements.append(Judgement(None, "connection: lost", answered=False, failure="connection"))
            else:
                judgements.append(Judgement(answer, str(answer)))
        return judgements


def images_of(conversation):
    return [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]


def shape_of(conversation):
    """A conversation with its texts as they are, and `0`, `1` … for its images."""
    numbers = iter(range(99))
    return [
        (message["role"], [part["text"] if part["type"] == "text" else next(numbers) for part in message["content"]])
        for message in conversation
    ]


# Stand-ins: the names and the makeup of the authors' files, with words of our own
VIE_PROMPTS = '''
_context_no_delimit_reasoning_first = """CONTEXT for 10 years {
"reasoning" : "...",
"score" : [...]
}
"""

_prompts_0shot_two_image_edit_rule = """RULES: two pictures.
"""

_prompts_0shot_tie_rule_SC = """
From 0 to 10: success and overediting.
Editing instruction: <instruction>
"""

_prompts_0shot_rule_PQ = """RULES: one picture.
From 0 to 10: naturalness and artifacts.
"""
'''
POINTWISE = """
instruction = ''
problem = "JUDGE it {\\n\\"score\\" : [...],\\n}\\n0 to 25.\\nEditing instruction:"+ f"{instruction}\\n"
output = evaluate_batch([problem], "http://localhost:8080")
"""
QUALITY = 'problem = "JUDGE one picture, 0 to 25."\n'
PAIRWISE = 'problem = f"COMPARE two.\\nText instruction - {instruction}\\n"\n'
RATIONAL = '''
SYSTEM_PROMPT = (
    "You are "
    "an evaluator."
)
TASK_RELATED_TEMPLATE = """User Instruction: {request}
1. Source Image <image>
2. Edited Image <image>

Judge. """
COMMON_TASK_GUIDELINE = """GUIDE from 1 to 4."""
class Other:
    pass
'''
FIRM = '''
SCORE_LOGIT = """not used"""
SCORE_CONSISTENCY = """CONSISTENCY
Instruction: {prompt}
{{
"score" : [1/2/3/4/5]
}}
"""
SCORE_EXECUTION = """EXECUTION
Instruction: {prompt}
{{
"score" : [1/2/3/4/5]
}}
"""
'''
SPATIAL = '''
SC_PROMPT_TEMPLATE = """WHERE {{"id": 0~n}} and how, 0 to {score_range}.
- <|bbox_{{id}}|> before each region
- <|global|> before the whole
Editing instruction:
{instruction}"""
PQ_PROMPT_TEMPLATE = """{{{{
"score" : [...]
}}}}
0 to {score_range}.
"""
'''
ASPECTS = """# User Request Analysis
Text Faithfulness is what counts here.
# Detailed Judgement
1. Text Faithfulness:
## Justification: All of it was done, so the anchor is 4.
## Score: 3.8
2. Image Faithfulness:
## Justification: The wall has another color.
## Score: 3.0
3. Physical and Visual Quality:
## Justification: A seam.
## Score: 3.4
4. Text Rendering:
## Justification: No text is asked for.
## Score: N/A
# Summary: 1. Text Faithfulness: ## Score: 1

# User Request Refinement:
## Refined Request: Add a cat.
"""
