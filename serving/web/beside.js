// The world beside the played one: another version, from the same prompt, seed and sampling, takes the same actions.

import { persist } from "./service.js";
import { drop, World } from "./world.js";

export class Beside {
  /** `choose(t)` is called when the player picks one of its past frames; `lost` and `found` tell of the service. */
  constructor(choose, lost, found) {
    this.world = new World("beside", choose, async (request, signal) => {
      const answer = await persist(request, signal, (error) => {
        if (error.refused) throw error;
        lost(error);
      });
      found();
      return answer;
    });
    this.world.figure.hidden = true;
  }

  /** What is wrong is said in its place; the played one goes on alone. */
  async open(version, played) {
    const { world } = this;
    world.leave();
    world.figure.hidden = !version;
    if (!version) return;
    world.name(`version ${version}`);
    world.tell("Opening …");
    const { signal } = world;
    const { seed, temperature, maskgit_steps, model } = played.session;
    try {
      const fields = { image: played.prompt, version, seed, temperature, maskgit_steps };
      const created = await world.create(fields, signal);
      const { id, model: { num_actions } } = created.session;
      if (num_actions !== model.num_actions) {
        drop(id);
        throw new Error(`It has ${num_actions} actions and version ${model.version} has ${model.num_actions}: they cannot take the same.`);
      }
      world.enter(created);
    } catch (error) {
      this.#fail(error, signal);
    }
  }

  /** Does what the played one did, if it is there. */
  async follow(work) {
    const { world } = this;
    if (!world.session) return;
    const { signal } = world;
    try {
      await work(world);
    } catch (error) {
      this.#fail(error, signal);
    }
  }

  /** Frame t, or the newest it has come to. */
  look(t) { if (this.world.session) this.world.look(Math.min(t, this.world.session.steps)); }

  #fail(error, signal) {
    if (signal.aborted) return;   // it was left meanwhile
    this.world.leave();
    this.world.tell(error.message);
  }
}
