"""From guidances to paid lessons: the student's attempts with each, the reference teacher's, and the rewards."""

from __future__ import annotations

from collections.abc import Sequence

from atroposlib.envs.gathering import all_or_none
from atroposlib.errors import RolloutError
from atroposlib.teaching.config import TeacherEnvConfig
from atroposlib.teaching.episode import Guidance, Lesson, PaidLesson, Preparation
from atroposlib.teaching.frozen_model import FrozenModel, Sampling
from atroposlib.teaching.protocol import TeachingProtocol
from atroposlib.teaching.scoring import Judges, judged, relative_to_reference, reward_of


class Payment:
    """Pays the guidances of one group.

    Args:
        judges: for teaching_reward_mode=rim.
        reference: the teacher that rewards are relative to, if any.
    """

    def __init__(
        self,
        config: TeacherEnvConfig,
        protocol: TeachingProtocol,
        *,
        judges: Judges | None = None,
        reference: FrozenModel | None = None,
    ) -> None:
        self._config = config
        self._protocol = protocol
        self._judges = judges
        self._reference = reference

    async def lessons(self, preparation: Preparation, guidances: Sequence[Guidance]) -> list[PaidLesson | None]:
        """One lesson for each guidance; None where the student or the judges could not be asked.

        Raises:
            RolloutError: the reference teacher could not be asked or paid.
        """
        reference, *taught = await all_or_none(
            [self._reference_lesson(preparation), *(self._taught(preparation, one) for one in guidances)]
        )
        given = [one for one in (reference, *taught) if one is not None]
        # All at once: judges take as long for one as for many.
        paid = iter(await self._pay(preparation, given))
        least, *members = [None if one is None else next(paid) for one in (reference, *taught)]
        if self._reference is None:
            return members
        if least is None:
            raise RolloutError(
                "the reference teacher's guidance could not be paid, so there is nothing to compare with"
            )
        return [None if one is None else relative_to_reference(one, least.reward) for one in members]

    async def _taught(self, preparation: Preparation, guidance: Guidance) -> Lesson | None:
        attempts = self._config.student_samples_per_guidance
        return await self._protocol.teach(preparation, guidance, attempts=attempts)

    async def _pay(self, preparation: Preparation, lessons: Sequence[Lesson]) -> list[PaidLesson | None]:
        if self._config.teaching_reward_mode == "rim" and self._judges is not None:
            return await judged(preparation, lessons, self._config, self._judges)
        return [PaidLesson(lesson, reward_of(preparation, lesson, self._config)) for lesson in lessons]

    async def _reference_lesson(self, preparation: Preparation) -> Lesson | None:
        """What one guidance of the reference teacher does; None without one."""
        if self._reference is None:
            return None
        sampling = Sampling(self._config.temperature, self._config.guidance_tokens)
        reply = await self._reference.reply(preparation.teacher_prompt, sampling)
        return await self._taught(preparation, self._protocol.guidance(reply.text, reply.tokens))
