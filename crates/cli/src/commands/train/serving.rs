//! A rank that has the target and trains nothing: it computes features for those that do, and decodes with their draft.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use specforge_config::RunPlan;
use specforge_data::Prepared;
use specforge_methods::Ranks;
use specforge_train::{Checkpoint, Line, Online, Position, Server};

use super::decoder::{Decoder, Measured, as_hook};
use super::order;
use crate::ranks::Ending;
use crate::setup;

/// Those that this rank serves.
pub(super) struct Served<'a> {
    /// Those that share the target with this rank.
    pub(super) sharing: Option<Arc<dyn specforge_tensor::Group>>,
    /// Their places among the ranks that rows are dealt to, and how many of these there are.
    pub(super) peers: Range<usize>,
    pub(super) dealt: usize,
    /// For each, the lines to those that share its batches.
    pub(super) clients: Vec<Vec<Line>>,
    /// Where the run goes on.
    pub(super) resume: Option<&'a Checkpoint>,
}

/// Serves until the run ends or stops.
pub(super) fn serve(
    plan: &RunPlan,
    data: &Arc<Prepared>,
    (train_rows, held_out): (&[usize], &[usize]),
    served: Served<'_>,
) -> Result<Ending> {
    let Served { sharing, peers, dealt, clients, resume } = served;
    let target = setup::target(plan, sharing.as_ref())?;
    let (info, alone) = (target.info().clone(), Ranks::default());
    info.expect_teacher()?;
    setup::expect_room(&info, data)?;
    let frozen = setup::frozen_of(plan, &target, &alone)?;
    let (method, params) = setup::draft(plan, &info, &frozen, data, &alone)?;
    let online = Online {
        target: target.clone(),
        data: data.clone(),
        capture: method.capture().clone(),
        dtype: setup::capture_dtype(plan),
        peers: Some(peers.clone()),
    };
    let prompts = setup::prompts(plan, held_out, data, plan.eval.max_prompts)?;
    let (in_step, decodes, far) = (sharing.is_some(), true, None);
    let mut decoder =
        Decoder { target: Some(target), sharing, decodes, in_step, far, plan: plan.clone(), prompts };
    let (order, total_steps) = order(plan, data, train_rows);
    let position = resume.map_or(Position::default(), |checkpoint| checkpoint.state.position);
    let steps = order.steps_from(position, total_steps);
    let mut planned = steps.flat_map(|step| order.rounds(&step, peers.clone(), dealt));
    Server::new(online, clients, params).serve(&mut planned, &mut |params, whole| {
        let measured = decoder.measure(method.as_ref(), params, whole).map_err(as_hook)?;
        Ok(measured.as_ref().map_or_else(Vec::new, Measured::figures))
    })?;
    Ok(Ending::Done)
}
