/**
 * Which engine does a transform: the fastest one that is installed, knows it, and gives the known answers. The reasons why
 * the faster ones were passed over are kept, because hardware and libraries differ from one machine to the next.
 *
 * Known answers are computed once per transform and engine in this process, when the transform is first asked for.
 */
import type { MappedMemory } from '../../sys/memory.ts';
import { type CryptoEngine, EngineError, type EngineName, type Transform } from './engine.ts';
import { IpsecMbEngine } from './ipsec-mb.ts';
import { checkKnownAnswers } from './known-answers.ts';
import { NobleEngine } from './noble.ts';
import { OpensslEngine } from './openssl.ts';

export type EngineChoice = 'auto' | EngineName;

/** Fastest first. */
export const ENGINE_NAMES: readonly EngineName[] = ['ipsec-mb', 'openssl', 'noble'];

/** One engine on this machine. */
export interface EngineReport {
  readonly name: EngineName;
  /** Library and version; undefined when the engine cannot be had. */
  readonly version: string | undefined;
  /** Why it cannot be had; undefined when it can. */
  readonly refusal: EngineError | undefined;
}

/** Who does a transform, and why nobody faster. */
export interface EngineSelection {
  readonly engine: CryptoEngine;
  /** Faster engines in order. The codes are those of `EngineError`. */
  readonly passedOver: readonly { readonly name: EngineName; readonly refusal: EngineError }[];
}

type Opened = { readonly engine: CryptoEngine } | { readonly refusal: EngineError };

function create(name: EngineName, memory: MappedMemory, forAnswers: boolean): CryptoEngine {
  if (name === 'ipsec-mb') return new IpsecMbEngine(memory, { checked: forAnswers });
  return name === 'openssl' ? new OpensslEngine(memory) : new NobleEngine(memory);
}

/** What was wrong with the known answers, by engine, version and transform; null is nothing. */
const answers = new Map<string, string | null>();

function wrongAnswer(engine: CryptoEngine, transform: Transform): string | null {
  const key = `${engine.version} ${transform.id}`;
  let wrong = answers.get(key);
  if (wrong === undefined) {
    wrong = checkKnownAnswers(transform, (memory) => create(engine.name, memory, true)) ?? null;
    answers.set(key, wrong);
  }
  return wrong;
}

/** The engines for one memory. */
export class Engines {
  readonly #memory: MappedMemory;
  readonly #names: readonly EngineName[];
  readonly #opened = new Map<EngineName, Opened>();
  readonly #selections = new Map<Transform, EngineSelection>();

  /** Nothing is loaded before it is needed. */
  constructor(memory: MappedMemory, choice: EngineChoice = 'auto') {
    this.#memory = memory;
    this.#names = choice === 'auto' ? ENGINE_NAMES : [choice];
  }

  /** Throws the `EngineError` of the only engine that was allowed, or `TRANSFORM_UNSUPPORTED` when none of several can. */
  select(transform: Transform): EngineSelection {
    const known = this.#selections.get(transform);
    if (known !== undefined) return known;
    const passedOver: { name: EngineName; refusal: EngineError }[] = [];
    for (const name of this.#names) {
      const candidate = this.#candidate(name, transform);
      if ('engine' in candidate) {
        const selection = { engine: candidate.engine, passedOver };
        this.#selections.set(transform, selection);
        return selection;
      }
      passedOver.push({ name, refusal: candidate.refusal });
    }
    if (passedOver.length === 1) throw passedOver[0].refusal;
    const reasons = passedOver.map(({ refusal }) => refusal.message).join('; ');
    throw new EngineError('TRANSFORM_UNSUPPORTED', `no engine does ${transform.id}: ${reasons}`);
  }

  /** What this machine has of the engines that may be used, fastest first. Opens them. */
  reports(): readonly EngineReport[] {
    return this.#names.map((name) => {
      const opened = this.#open(name);
      if ('refusal' in opened) return { name, version: undefined, refusal: opened.refusal };
      return { name, version: opened.engine.version, refusal: undefined };
    });
  }

  close(): void {
    for (const opened of this.#opened.values()) if ('engine' in opened) opened.engine.close();
    this.#opened.clear();
    this.#selections.clear();
  }

  #candidate(name: EngineName, transform: Transform): Opened {
    const opened = this.#open(name);
    if ('refusal' in opened) return opened;
    const { engine } = opened;
    if (!engine.supports(transform)) {
      return { refusal: new EngineError('TRANSFORM_UNSUPPORTED', `${name}: ${engine.version} has no ${transform.id}`) };
    }
    const wrong = wrongAnswer(engine, transform);
    if (wrong === null) return opened;
    return {
      refusal: new EngineError('ENGINE_KNOWN_ANSWER', `${name}: ${engine.version} fails ${transform.id}: ${wrong}`),
    };
  }

  #open(name: EngineName): Opened {
    let opened = this.#opened.get(name);
    if (opened === undefined) {
      opened = this.#tryOpen(name);
      this.#opened.set(name, opened);
    }
    return opened;
  }

  #tryOpen(name: EngineName): Opened {
    try {
      return { engine: create(name, this.#memory, false) };
    } catch (error) {
      if (error instanceof EngineError) return { refusal: error };
      throw error;
    }
  }
}
