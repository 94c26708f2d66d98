//! Final gradients are told of in time, complete, and in the same order every time.

use super::matrix;
use crate::{Grads, ParamId, Params, Result, Tape, Tensor, Weight};

/// Two rows through a norm, a matrix that is used twice, and another; one that nothing uses, and a frozen one.
struct Net {
    params: Params,
    norm: ParamId,
    twice: ParamId,
    once: ParamId,
}

fn net() -> Net {
    let mut params = Params::new();
    let square = |phase: f32| matrix((0..16).map(|i| (i as f32 + phase).sin()).collect(), &[4, 4]);
    let norm = params.add("norm", matrix(vec![1.0, 0.5, 2.0, -1.0], &[4]), true);
    let twice = params.add("twice", square(0.0), true);
    let once = params.add("once", square(5.0), true);
    params.add("unused", square(9.0), true);
    params.add("frozen", square(7.0), false);
    Net { params, norm, twice, once }
}

impl Net {
    fn backward(&self, told: impl FnMut(&[ParamId], &mut Grads) -> Result<()>) -> Grads {
        let tape = Tape::recording(&self.params);
        let x = tape.input(matrix((0..8).map(|i| (i as f32).cos()).collect(), &[2, 4]));
        let h = tape.rms_norm(&x, self.norm, 1e-5).unwrap();
        let h = tape.linear(&h, &Weight::of(self.twice)).unwrap();
        let h = tape.linear(&h, &Weight::of(self.once)).unwrap();
        let h = tape.linear(&h, &Weight::of(self.params.find("frozen").unwrap())).unwrap();
        let y = tape.linear(&h, &Weight::of(self.twice)).unwrap();
        tape.seed(&y, matrix(vec![1.0, -2.0, 0.5, 3.0, 0.25, 1.0, -1.0, 2.0], &[2, 4]));
        tape.backward_telling(told).unwrap()
    }
}

#[test]
fn final_gradients_are_told_of_when_the_first_use_is_passed() {
    let net = net();
    let whole = net.backward(|_, _| Ok(()));
    let mut told = Vec::new();
    let left = net.backward(|ids, grads| {
        told.extend(ids.iter().map(|id| (*id, grads.take(*id))));
        Ok(())
    });
    let names: Vec<&str> = told.iter().map(|(id, _)| net.params.get(*id).name.as_str()).collect();
    assert_eq!(names, ["unused", "once", "twice", "norm"]);
    for (id, grad) in &told {
        assert_eq!(grad.as_ref().map(Tensor::to_f32), whole.get(*id).map(Tensor::to_f32));
        assert!(left.get(*id).is_none(), "what was taken stays away");
    }
}

/// Matrices that lie together are told of together: one of them alone may be used earlier.
#[test]
fn stacked_gradients_are_final_together() {
    let mut net = net();
    net.params.stack(&[net.twice, net.once]).unwrap();
    let mut told = Vec::new();
    net.backward(|ids, _| {
        told.push(ids.to_vec());
        Ok(())
    });
    assert_eq!(told[1..], [vec![net.twice, net.once], vec![net.norm]]);
}

/// An error on the way to others ends the backward.
#[test]
fn an_error_of_who_is_told_is_the_error_of_the_backward() {
    let net = net();
    let tape = Tape::recording(&net.params);
    let error = tape.backward_telling(|_, _| Err(crate::Error::NoGradient { op: "told" })).unwrap_err();
    assert!(error.to_string().contains("told"), "{error}");
}
