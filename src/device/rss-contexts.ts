/**
 * RSS contexts of the device (Virtio 1.4, 5.1.9.5.8; RSS_CONTEXT): configurations of receive-side scaling besides the default one, by id.
 *
 * They are kept and checked like the default configuration, and that is all that the standard has for them: nothing in it, no action of the flow
 * filter either, sends a packet to a context.
 */
import {
  decodeRssConfig,
  getLe,
  putLe,
  type RssConfig,
  RssContextCommand,
  RssContextField,
} from '../virtio-net/control-wire.ts';

/** Contexts that there can be; their ids begin with 1. */
export const RSS_CONTEXTS = 8;
/** `struct virtnet_rss_ctx_cap`. */
const CAPABILITY_LENGTH = 2;

const REFUSED = null;
const DONE = new Uint8Array(0);

export class RssContexts {
  readonly #configs = new Map<number, RssConfig>();
  readonly #isValid: (config: RssConfig) => boolean;

  /** `isValid` says whether a configuration could be the default one. */
  constructor(isValid: (config: RssConfig) => boolean) {
    this.#isValid = isValid;
  }

  get count(): number {
    return this.#configs.size;
  }

  /** As after a reset. */
  clear(): void {
    this.#configs.clear();
  }

  /** Executes one of `RssContextCommand`; gives its result, or null when it fails and has changed nothing. */
  execute(command: number, data: Uint8Array): Uint8Array | null {
    if (command === RssContextCommand.CAP_GET) {
      const result = new Uint8Array(CAPABILITY_LENGTH);
      putLe(result, 0, CAPABILITY_LENGTH, RSS_CONTEXTS);
      return result;
    }
    if (data.length < RssContextField.reserved) return REFUSED;
    const id = getLe(data, RssContextField.id, 2);
    const exists = this.#configs.has(id);
    if (command === RssContextCommand.DEL) return this.#configs.delete(id) ? DONE : REFUSED;
    if (command !== RssContextCommand.ADD && command !== RssContextCommand.MOD) return REFUSED;
    // A new one with ADD, one that is there with MOD.
    if (id < 1 || id > RSS_CONTEXTS || exists !== (command === RssContextCommand.MOD)) return REFUSED;
    const config = decodeRssConfig(data.subarray(RssContextField.config));
    if (config === null || !this.#isValid(config)) return REFUSED;
    this.#configs.set(id, config);
    return DONE;
  }
}
