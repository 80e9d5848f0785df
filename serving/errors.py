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

    def __init__(self, message: str) -> None:
        headers = {"Retry-After": str(self.retry_after_seconds)} if self.retry_after_seconds else None
        super().__init__(self.status, message, headers)


class UnknownSessionError(ServiceError):
    status, code = 404, "unknown_session"


class UnknownStartFrameError(ServiceError):
    status, code = 404, "unknown_start_frame"


class SessionMovedError(ServiceError):
    status, code = 409, "session_moved"


class UploadTooLargeError(ServiceError):
    status, code = 413, "upload_too_large"


class NotAnImageError(ServiceError):
    status, code = 415, "not_an_image"


class BadRequestError(ServiceError):
    status, code = 422, "invalid_request"


class BusyError(ServiceError):
    status, code, retry_after_seconds = 429, "too_many_requests", 1


class PassFailedError(ServiceError):
    status, code = 500, "model_failed"


class NotReadyError(ServiceError):
    status, code, retry_after_seconds = 503, "not_ready", 5


class StoreError(ServiceError):
    """The store of sessions does not answer, or cannot write; its reason is in the log."""

    status, code, retry_after_seconds = 503, "store_unavailable", 2

    def __init__(self) -> None:
        super().__init__("sessions cannot be reached at the moment: send the same again soon")


class TooManySessionsError(ServiceError):
    status, code, retry_after_seconds = 503, "too_many_sessions", 30


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error answer of `app` the one body, those of the framework included."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = error.code if isinstance(error, ServiceError) else HTTPStatus(error.status_code).name.lower()
        return _answer(error.status_code, code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
        return _answer(BadRequestError.status, BadRequestError.code, "; ".join(problems))

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        return _answer(500, ServiceError.code, "the service failed; its log says why")


def problem(status: int, code: str, detail: str) -> dict[str, object]:
    """The body: `title` is the status in words, `detail` says what to do, `code` is for programs."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "code": code, "detail": detail}


def _answer(status: int, code: str, detail: str, headers: object = None) -> JSONResponse:
    body = problem(status, code, detail)
    return JSONResponse(body, status, headers, media_type="application/problem+json")  # type: ignore[arg-type]
