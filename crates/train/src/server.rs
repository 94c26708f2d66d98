//! The target's side of a run whose target has ranks of its own: features in the order in which they will be asked for, one
//! round ahead of the training, and decoding with the draft of the moment.

use std::collections::VecDeque;

use specforge_methods::{Batch, Teacher};
use specforge_parallel::tell_numbers;
use specforge_tensor::{Params, Tensor};

use crate::line::{Line, Request};
use crate::{Error, FeatureSource, MicroBatch, Online, Result};

/// A target that serves ranks that train. Ranks that share it each have one, and make the same calls; the first of them
/// has the lines.
#[derive(Debug)]
pub struct Server {
    online: Online,
    /// For each of the ranks that rows are dealt to and that are served here, the lines to those that share its batches.
    clients: Vec<Vec<Line>>,
    /// The draft, for decoding.
    params: Params,
    /// Computed and not asked for yet.
    ahead: VecDeque<(MicroBatch, Batch)>,
}

/// Decodes with the draft's weights, the whole measure or a quick one; its figures.
pub type Decode<'a> = dyn FnMut(&Params, bool) -> Result<Vec<f64>> + 'a;

impl Server {
    /// Over a target. `params` are a draft's, whatever their values.
    pub fn new(online: Online, clients: Vec<Vec<Line>>, params: Params) -> Self {
        Self { online, clients, params, ahead: VecDeque::new() }
    }

    /// Serves until the first client has no more to ask. `planned` are the rounds that training will ask for, each with
    /// the rows of every client; anything else is computed when it is asked for.
    pub fn serve(
        &mut self,
        planned: &mut dyn Iterator<Item = Vec<MicroBatch>>,
        decode: &mut Decode<'_>,
    ) -> Result<()> {
        loop {
            // While this is computed, the round before is trained on. One is enough to keep both sides at work, and more
            // would be that many batches in memory.
            if self.ahead.is_empty() {
                self.compute(planned.next().unwrap_or_default())?;
            }
            for client in 0..self.clients.len() {
                let Some(rows) = self.next_rows(client, decode)? else { return Ok(()) };
                self.answer(client, &rows)?;
            }
        }
    }

    fn compute(&mut self, round: Vec<MicroBatch>) -> Result<()> {
        for rows in round.into_iter().filter(|rows| !rows.is_empty()) {
            let batch = self.online.fetch(&rows)?;
            self.ahead.push_back((rows, batch));
        }
        Ok(())
    }

    /// The rows that a client and those that share its batch ask for. Between two rounds the first one may ask for
    /// something else, and for an end.
    fn next_rows(&mut self, client: usize, decode: &mut Decode<'_>) -> Result<Option<MicroBatch>> {
        let first = loop {
            match self.hear(client, 0)? {
                Request::Decode { whole } if client == 0 => self.decode(whole, decode)?,
                request => break request,
            }
        };
        let Request::Rows(rows) = first else {
            let line = &self.clients[client][0];
            let why = format!("rank {} asks for {first:?} in the middle of a round", line.other);
            return if client == 0 && first == Request::End { Ok(None) } else { Err(line.out_of_step(why)) };
        };
        for line in 1..self.clients[client].len() {
            let other = self.hear(client, line)?;
            if other != Request::Rows(rows.clone()) {
                let line = &self.clients[client][line];
                let why = format!("rank {} asks for {other:?}, another for rows {rows:?}", line.other);
                return Err(line.out_of_step(why));
            }
        }
        Ok(Some(rows))
    }

    /// Whether this rank has the lines.
    fn has_lines(&self) -> bool {
        self.online.target.ranks().is_none_or(|ranks| ranks.rank() == 0)
    }

    /// What is asked over a line, on all ranks that share the target.
    fn hear(&self, client: usize, line: usize) -> Result<Request> {
        let line = &self.clients[client][line];
        let heard = if self.has_lines() { line.hear()? } else { Vec::new() };
        let heard = match self.online.target.ranks() {
            Some(ranks) => tell_numbers(ranks.as_ref(), line.device, 0, &heard)?,
            None => heard,
        };
        let why = || format!("rank {} asks for something unknown", line.other);
        Request::from_numbers(&heard).ok_or_else(|| line.out_of_step(why()))
    }

    /// Sends the features of rows to a client and those that share its batch.
    fn answer(&mut self, client: usize, rows: &[usize]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let batch = match self.ahead.front() {
            Some((planned, _)) if planned == rows => self.ahead.pop_front().map(|(_, batch)| batch),
            _ => None,
        };
        let batch = batch.map_or_else(|| self.online.fetch(rows), Ok)?;
        if self.has_lines() {
            self.clients[client].iter().try_for_each(|line| send(line, &batch))?;
        }
        Ok(())
    }

    /// Takes over the draft's weights and decodes.
    fn decode(&mut self, whole: bool, decode: &mut Decode<'_>) -> Result<()> {
        let has_lines = self.has_lines();
        let (line, ranks) = (&self.clients[0][0], self.online.target.ranks());
        let trained: Vec<_> = self.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for id in trained {
            let value = &mut self.params.get_mut(id).value;
            let mut came = value.unwritten_like(value.shape())?;
            if has_lines {
                line.receive(&mut came)?;
            }
            ranks.map_or(Ok(()), |ranks| ranks.broadcast(&mut came, 0))?;
            value.assign(&came)?;
        }
        let figures = decode(&self.params, whole)?;
        if has_lines { line.tell(&figures) } else { Ok(()) }
    }
}

/// What of a batch the other end does not know, as `Received` takes it.
fn send(line: &Line, batch: &Batch) -> Result<()> {
    let Teacher::LastHidden { hidden, argmax, logsumexp } = &batch.teacher else {
        return Err(Error::Mode("a target gives last hidden states, not logits".to_owned()));
    };
    let argmax = Tensor::from_u32(line.device, argmax.clone());
    [&batch.hidden_states, hidden, &argmax, logsumexp].into_iter().try_for_each(|x| line.send(x))
}
