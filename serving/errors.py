"""Every error a client can meet: one class, one status, one body, application/problem+json (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ServiceError(HTTPException):
    """An error whose message tells the client what to do. Subclasses set the status and the code."""

    status = 500
    code = "internal"
    retry_after_seconds: int | None = None

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        wait = retry_after_seconds or self.retry_after_seconds
        super().__init__(self.status, message, {"Retry-After": str(wait)} if wait else None)


class UnauthorizedError(ServiceError):
    status, code = 401, "unauthorized"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"WWW-Authenticate": 'Basic realm="Genie", charset="UTF-8", Bearer'}


class ForeignPageError(ServiceError):
    status, code = 403, "foreign_page"


class UnknownSessionError(ServiceError):
    status, code = 404, "unknown_session"


class UnknownStartFrameError(ServiceError):
    status, code = 404, "unknown_start_frame"


class UnknownVersionError(ServiceError):
    status, code = 404, "unknown_version"


class SessionMovedError(ServiceError):
    status, code = 409, "session_moved"


class UploadTooSlowError(ServiceError):
    status, code = 408, "upload_too_slow"


class UploadTooLargeError(ServiceError):
    status, code = 413, "upload_too_large"


class NotAnImageError(ServiceError):
    status, code = 415, "not_an_image"


class BadRequestError(ServiceError):
    status, code = 422, "invalid_request"


class NoLargeFramesError(ServiceError):
    status, code = 422, "no_large_frames"


class TooManyRequestsError(ServiceError):
    status, code, retry_after_seconds = 429, "too_many_requests", 1


class TooManySocketsError(ServiceError):
    status, code, retry_after_seconds = 429, "too_many_sockets", 5


class TooManySessionsOfClientError(ServiceError):
    status, code = 429, "too_many_sessions_of_client"


class PassFailedError(ServiceError):
    status, code = 500, "model_failed"


class SlowStepError(ServiceError):
    status, code, retry_after_seconds = 503, "step_too_slow", 1


class SlowJobError(ServiceError):
    status, code, retry_after_seconds = 503, "job_too_slow", 10


class SlowUploadError(ServiceError):
    status, code, retry_after_seconds = 503, "decoding_too_slow", 5


class NotReadyError(ServiceError):
    status, code, retry_after_seconds = 503, "not_ready", 5


class BrokenVersionError(ServiceError):
    status, code, retry_after_seconds = 503, "version_broken", 60


class TooManyVersionsError(ServiceError):
    status, code, retry_after_seconds = 503, "too_many_versions", 30


class StoreError(ServiceError):
    """The store of sessions does not answer, or cannot write; its reason is in the log."""

    status, code, retry_after_seconds = 503, "store_unavailable", 2

    def __init__(self) -> None:
        super().__init__("sessions cannot be reached at the moment: send the same again soon")


class TooManySessionsError(ServiceError):
    status, code, retry_after_seconds = 503, "too_many_sessions", 30


class TooManyConnectionsError(ServiceError):
    status, code, retry_after_seconds = 503, "too_many_connections", 5

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {**(self.headers or {}), "Connection": "close"}  # a place for another


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error answer of `app` the one body, those of the framework included."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:  # a body that FastAPI cannot read is as wrong as one with a wrong field
            error = BadRequestError(error.detail)
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
        return _answer(BadRequestError.status, BadRequestError.code, "; ".join(problems))


def problem(status: int, code: str, detail: str) -> dict[str, object]:
    """The body: `title` is the status in words, `detail` says what to do, `code` is for programs."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail}


def answer(error: HTTPException) -> JSONResponse:
    code = error.code if isinstance(error, ServiceError) else HTTPStatus(error.status_code).name.lower()
    return _answer(error.status_code, code, error.detail, error.headers)


def _answer(status: int, code: str, detail: str, headers: object = None) -> JSONResponse:
    body = problem(status, code, detail.encode(errors="replace").decode())  # a client may send half a character
    return JSONResponse(body, status, headers, media_type="application/problem+json")  # type: ignore[arg-type]
