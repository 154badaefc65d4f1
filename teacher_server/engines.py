"""Which class runs which ``engine`` of the configuration: where a further engine is named."""

from __future__ import annotations

from opd_mesh.config.services import TeacherConfig, TeacherServerConfig
from teacher_server.base_model import BaseModels
from teacher_server.engine import TeacherEngine
from teacher_server.tensorrt_engine import TensorRtEngine
from teacher_server.transformers_engine import TransformersEngine


def load_engine(
    teacher_id: str, teacher: TeacherConfig, server: TeacherServerConfig, bases: BaseModels
) -> TeacherEngine:
    """Load and prove one teacher. Raises the errors of its engine's constructor."""
    match teacher.engine:
        case "transformers":
            return TransformersEngine(teacher_id, teacher, bases, deterministic=server.deterministic)
        case "tensorrt_llm":
            return TensorRtEngine(
                teacher_id,
                teacher,
                bases.folder_of(teacher.path),
                deterministic=server.deterministic,
                stays_loaded=server.pool.memory_bytes is None,
            )
