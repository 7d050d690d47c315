"""Deployments: deploy, list, look, undeploy."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from flash.control_plane import deploying
from flash.control_plane.auth import Me, Plane
from flash.records import DeployAnswer, Deployment, DeployRequest

router = APIRouter(prefix="/api/deployments", tags=["deployments"])


class DeploymentList(BaseModel):
    deployments: list[Deployment]


@router.post(
    "",
    status_code=201,
    responses={
        200: {"model": DeployAnswer, "description": "what a deploy would do (`dry_run`)"},
        202: {"model": DeployAnswer, "description": "the engine is not ready yet: ask again"},
    },
)
async def deploy(body: DeployRequest, request: Request, response: Response, me: Me, plane: Plane) -> DeployAnswer:
    request.state.object = f"run={body.run_id}"
    done = await deploying.deploy(plane, request.app.state.hosts, me, body)
    response.status_code = {"planned": 200, "waiting": 202, "live": 201}[done.state]
    return done


@router.get("")
def index(me: Me, plane: Plane) -> DeploymentList:
    return DeploymentList(deployments=deploying.list_deployments(plane, me.org))


@router.get("/{run_id}")
def show(run_id: str, me: Me, plane: Plane) -> Deployment:
    return deploying.get_deployment(plane, me.org, run_id)


@router.delete("/{run_id}")
def undeploy(run_id: str, me: Me, plane: Plane) -> Deployment:
    """Takes the run's name back; answers with what was live. Requests under way are finished."""
    return deploying.undeploy(plane, me.org, run_id)
