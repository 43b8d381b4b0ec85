import { interopScenario } from '../bodies/interop.ts';

export const scenario = interopScenario({ parts: ['aead', 'cipher', 'integrity', 'options'], where: 'software' });
